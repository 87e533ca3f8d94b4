"""Positions of text and image tokens against transformers' `get_rope_index`."""

from __future__ import annotations

import pytest
import torch
from tiny_qwen3_vl import END, IMAGE, MERGE, PATCH_FEATURES, START, Conversation, config, conversation, reference

from copd_megatron.errors import DataError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl.config import settings
from copd_megatron.policy.qwen3_vl.rope import continuation_positions, prompt_positions, text_angles
from copd_megatron.policy.qwen3_vl.vision import PatchGrid

CONVERSATIONS = [
    conversation(1, 9, [5]),
    conversation(2, 5, [4], [(1, 4, 8)]),
    conversation(3, 7, [6], [(1, 8, 4), (1, 2, 2), (1, 10, 6)]),
    conversation(4, 3, [1], [(1, 4, 4), (1, 4, 4)]),
]


def hf_positions(each: Conversation) -> torch.Tensor:
    ids = torch.tensor([each.prompt + each.responses[0]])
    model = reference(config()).model
    return model.get_rope_index(ids, (ids == IMAGE).int(), image_grid_thw=each.grid_thw)[0][:, 0]


@pytest.mark.parametrize("each", CONVERSATIONS)
def test_positions_equal_transformers(each: Conversation) -> None:
    expected = hf_positions(each)

    prompt = prompt_positions(each.prompt, each.grid_thw, IMAGE, MERGE)
    response = continuation_positions(prompt, len(each.responses[0]))

    assert torch.equal(torch.cat([prompt, response], dim=1), expected)


def test_adjacent_images_are_told_apart_by_their_grids() -> None:
    tokens = [1, *[IMAGE] * 2, *[IMAGE] * 1, 2]

    positions = prompt_positions(tokens, torch.tensor([[1, 2, 4], [1, 2, 2]]), IMAGE, MERGE)

    assert positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_a_missing_image_is_an_error() -> None:
    with pytest.raises(DataError, match="8 image tokens, but its 0 images make 0"):
        prompt_positions([START, *[IMAGE] * 8, END], None, IMAGE, MERGE)


def test_an_interrupted_image_is_an_error() -> None:
    with pytest.raises(DataError, match="image at token 1 is interrupted"):
        prompt_positions([START, IMAGE, END, IMAGE], torch.tensor([[1, 2, 4]]), IMAGE, MERGE)


def test_angles_equal_transformers_on_three_different_axes() -> None:
    model = reference(config()).model.language_model.rotary_emb
    positions = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))

    angles = text_angles(positions, 32, 1e4, (6, 5, 5))

    cos, sin = model(torch.zeros(1, 20, 128), positions[:, None])
    torch.testing.assert_close(angles[:, 0].cos(), cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles[:, 0].sin(), sin[0], rtol=0, atol=1e-6)


def test_patches_come_in_merge_blocks() -> None:
    grid = PatchGrid.of(torch.tensor([[1, 2, 4], [2, 2, 2]]), MERGE)

    assert list(zip(grid.row.tolist(), grid.column.tolist(), strict=True)) == [
        *[(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3)],
        *[(0, 0), (0, 1), (1, 0), (1, 1)] * 2,
    ]


def test_settings_count_the_features_of_a_patch() -> None:
    assert settings(config(), Layout(), "fp32").vision.patch_features == PATCH_FEATURES
