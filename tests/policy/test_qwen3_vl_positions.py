"""Positions of text, image and video tokens against transformers' `get_rope_index`."""

from __future__ import annotations

import pytest
import torch
from plain_inputs import positions_of
from tiny_qwen3_vl import (
    END,
    IMAGE,
    MERGE,
    PATCH_FEATURES,
    START,
    VIDEO,
    Conversation,
    Video,
    config,
    conversation,
    reference,
)

from copd_megatron.errors import DataError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl.config import settings
from copd_megatron.policy.qwen3_vl.rope import text_angles
from copd_megatron.policy.qwen3_vl.vision import PatchGrid
from copd_megatron.rollout.positions import MediaTokens, continuation_positions, prompt_positions
from copd_megatron.rollout.types import Media

CONVERSATIONS = [
    conversation(1, 9, [5]),
    conversation(2, 5, [4], [(1, 4, 8)]),
    conversation(3, 7, [6], [(1, 8, 4), (1, 2, 2), (1, 10, 6)]),
    conversation(4, 3, [1], [(1, 4, 4), (1, 4, 4)]),
    conversation(5, 3, [1], [Video(1, 4, 4)]),
    conversation(6, 9, [1], [Video(6, 2, 4)]),
    conversation(7, 5, [1], [(1, 4, 4), Video(3, 4, 2, 0.5), (1, 6, 4), Video(2, 2, 2)]),
]
TOKENS = MediaTokens(IMAGE, VIDEO, MERGE)


@pytest.mark.parametrize("each", CONVERSATIONS)
def test_positions_equal_transformers(each: Conversation) -> None:
    expected = positions_of(reference(config()), each.prompt, each.media)[:, 0]

    assert torch.equal(prompt_positions(each.prompt, each.media, TOKENS), expected)


@pytest.mark.parametrize("each", CONVERSATIONS[:4])
def test_a_response_continues_the_prompt_as_transformers_goes_on(each: Conversation) -> None:
    whole = positions_of(reference(config()), each.prompt + each.responses[0], each.media)[:, 0]

    response = continuation_positions(prompt_positions(each.prompt, each.media, TOKENS), len(each.responses[0]))

    assert torch.equal(response, whole[:, len(each.prompt) :])


def media(*grids: tuple[int, int, int], videos: tuple[int, ...] = ()) -> Media:
    return Media(torch.zeros(1), torch.tensor(grids), videos, (1.0,) * len(videos))


def test_adjacent_images_are_told_apart_by_their_grids() -> None:
    tokens = [1, *[IMAGE] * 2, *[IMAGE] * 1, 2]

    positions = prompt_positions(tokens, media((1, 2, 4), (1, 2, 2)), TOKENS)

    assert positions.tolist() == [[0, 1, 1, 3, 4], [0, 1, 1, 3, 4], [0, 1, 2, 3, 4]]


def test_a_missing_image_is_an_error() -> None:
    with pytest.raises(DataError, match="8 image tokens, but 0 images that make 0"):
        prompt_positions([START, *[IMAGE] * 8, END], None, TOKENS)


def test_an_interrupted_image_is_an_error() -> None:
    with pytest.raises(DataError, match="image at token 1 is interrupted"):
        prompt_positions([START, IMAGE, END, IMAGE], media((1, 2, 4)), TOKENS)


def test_items_in_another_order_than_their_tokens_are_an_error() -> None:
    swapped = media((1, 2, 4), (2, 2, 2), videos=(1,))
    tokens = [START, VIDEO, END, START, VIDEO, END, START, IMAGE, IMAGE, END]

    with pytest.raises(DataError, match="image at token 1 is interrupted"):
        prompt_positions(tokens, swapped, TOKENS)


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


def test_positions_that_an_engine_asked_for_first_can_be_trained_with() -> None:
    prompt = [START, *[IMAGE] * 6, END, *range(17)]
    with torch.inference_mode():
        positions = prompt_positions(prompt, media((1, 4, 6)), TOKENS)
    assert not positions.is_inference()
    assert prompt_positions(prompt, media((1, 4, 6)), TOKENS) is positions
