"""Qwen2.5-VL against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import gradients_equal_transformers
from plain_inputs import positions_of
from tiny_qwen2_5_vl import FRAMES, MIXED, ONE_IMAGE, SEVERAL_SIZES, TEXT, VIDEOS, config, published
from tiny_qwen3_vl import MERGE, Conversation, alone, pack, reference, reference_logits, token_loss

from copd_megatron.errors import ConfigError
from copd_megatron.policy.balance import Cost
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.policy.qwen3_vl.config import Recompute, load_config, settings
from copd_megatron.policy.qwen3_vl.rope import text_angles
from copd_megatron.policy.qwen3_vl.windowed import windows
from copd_megatron.rollout.positions import prompt_positions
from copd_megatron.weights.mapping import to_megatron

MODELS = {
    "one full layer": config(),
    "tied": config(tied=True),
    "windows alone": config(full=()),
    "a large window": config(full=(0, 2), window=64),
    "a window of one": config(window=15),
}


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(
    "conversations",
    [TEXT, ONE_IMAGE, SEVERAL_SIZES, FRAMES, VIDEOS, MIXED],
    ids=["text", "image", "sizes", "frames", "videos", "mixed"],
)
def test_logprobs_equal_transformers(layout: Layout, conversations: list[Conversation], hf_config: Any) -> None:
    hf = reference(hf_config)
    model = build_model(hf.config, layout, "fp32")
    to_megatron(published(hf.state_dict()), model)

    with torch.no_grad():
        ours = model[0](pack(conversations)).log_softmax(-1)
        theirs = reference_logits(hf, conversations).log_softmax(-1)

    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_through_shared_prompts_equal_transformers(layout: Layout, recompute: Recompute) -> None:
    hf = reference(config(tied=True))
    gradients_equal_transformers(layout, hf, MIXED, recompute, published)


def test_bf16_is_as_close_to_fp32_as_transformers(layout: Layout) -> None:
    hf = reference(config())
    with torch.no_grad():
        exact = reference_logits(hf, MIXED).log_softmax(-1)
        model = build_model(hf.config, layout, "bf16")
        to_megatron(published(hf.state_dict()), model)
        ours = model[0](pack(MIXED)).float().log_softmax(-1)
        theirs = reference_logits(hf.bfloat16(), MIXED).float().log_softmax(-1)

    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("each", [*SEVERAL_SIZES, *FRAMES, *VIDEOS])
def test_positions_equal_transformers(each: Conversation) -> None:
    expected = positions_of(reference(config()), each.prompt, each.media)[:, 0]

    assert torch.equal(prompt_positions(each.prompt, each.media, each.tokens), expected)


def test_angles_equal_transformers_on_three_different_axes() -> None:
    model = reference(config()).model.language_model.rotary_emb
    positions = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))

    angles = text_angles(positions, 20, 3e4, (2, 5, 3), interleaved=False)

    cos, sin = model(torch.zeros(1, 20, 120), positions[:, None])
    torch.testing.assert_close(angles[:, 0].cos(), cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(angles[:, 0].sin(), sin[0], rtol=0, atol=1e-6)


def test_windows_cut_frames_into_squares() -> None:
    """A frame of 2 × 4 merged patches, then two of 1 × 1, in windows of 3 × 3."""
    order, counts = windows(torch.tensor([[1, 4, 8], [2, 2, 2]]), MERGE, 3)

    assert order.tolist() == [0, 1, 2, 4, 5, 6, 3, 7, 8, 9]
    assert counts.tolist() == [6, 2, 1, 1]


def test_windows_cost_by_the_patch_and_full_layers_by_the_pair() -> None:
    few, all_full = (Cost.of(settings(config(full=full), Layout(), "fp32")) for full in ((1,), (0, 1, 2)))

    assert all_full.patch_pair == 4 * 3 * 72
    assert few.patch_pair == 4 * 72
    assert few.patch == all_full.patch + 2 * 4 * 72 * 36
    assert (few.token, few.pair) == (all_full.token, all_full.pair)


def test_a_text_batch_leaves_the_vision_tower_alone(layout: Layout) -> None:
    model = build_model(config(), layout, "fp32")
    batch = pack(TEXT)

    token_loss(model[0](batch), batch).backward()

    without = {name.partition(".")[0] for name, parameter in model[0].named_parameters() if parameter.grad is None}
    assert without == {"vision"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_sliding_window": True}, r"^text_config\.use_sliding_window is true"),
        ({"hidden_act": "relu"}, r"^text_config\.hidden_act is 'relu'"),
        ({"window": 7}, r"^vision_config\.window_size is 7; .* 8 pixels wide"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "mrope_section": [2, 5, 3]}},
            r"^text_config\.rope_parameters: rope_type 'yarn' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 5, 4]}},
            r"mrope_section is \[2, 5, 4\]; expected three numbers that add up to 10",
        ),
    ],
)
def test_what_released_models_do_not_use_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(config(**options), Layout(), "fp32")


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"world": 3, "tp": 3}, r"divide text_config\.num_key_value_heads = 2"),
        ({"world": 3, "pp": 3}, r"divide text_config\.num_hidden_layers = 4"),
        ({"world": 2, "ep": 2}, r"divides experts, and a 'qwen2_5_vl' has none"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(config(), Layout(**degrees), "fp32")


def test_a_published_config_file_is_understood(tmp_path: Path) -> None:
    """The form in which Qwen2.5-VL-3B-Instruct is published: the language model's fields at the top."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen2_5_VLForConditionalGeneration"],
                "attention_dropout": 0.0,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "vision_start_token_id": 151652,
                "vision_end_token_id": 151653,
                "vision_token_id": 151654,
                "image_token_id": 151655,
                "video_token_id": 151656,
                "hidden_act": "silu",
                "hidden_size": 2048,
                "initializer_range": 0.02,
                "intermediate_size": 11008,
                "max_position_embeddings": 128000,
                "max_window_layers": 70,
                "model_type": "qwen2_5_vl",
                "num_attention_heads": 16,
                "num_hidden_layers": 36,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-06,
                "rope_theta": 1000000.0,
                "sliding_window": 32768,
                "tie_word_embeddings": True,
                "use_sliding_window": False,
                "vision_config": {
                    "depth": 32,
                    "hidden_act": "silu",
                    "hidden_size": 1280,
                    "intermediate_size": 3420,
                    "num_heads": 16,
                    "in_chans": 3,
                    "out_hidden_size": 2048,
                    "patch_size": 14,
                    "spatial_merge_size": 2,
                    "spatial_patch_size": 14,
                    "window_size": 112,
                    "fullatt_block_indexes": [7, 15, 23, 31],
                    "tokens_per_second": 2,
                    "temporal_patch_size": 2,
                },
                "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
                "vocab_size": 151936,
            }
        )
    )

    found = settings(load_config(tmp_path), Layout(world=4, tp=2, pp=2), "bf16")

    assert (found.family, found.text.tied, found.text.rope_theta) == ("qwen2_5_vl", True, 1e6)
    assert (found.text.mrope_section, found.text.mrope_interleaved) == ((16, 24, 24), False)
    assert (found.text_config.kv_channels, found.text_config.add_qkv_bias) == (128, True)
    assert not found.text_config.qk_layernorm
    assert (found.vision.window, found.vision.full_layers) == (4, (7, 15, 23, 31))
    assert (found.vision_config.kv_channels, found.vision.patch_features) == (80, 1176)
