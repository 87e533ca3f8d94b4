from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from family_checks import gradients_equal_transformers
from tiny_qwen3_vl import (
    Conversation,
    Video,
    alone,
    config,
    conversation,
    pack,
    reference,
    reference_logits,
    token_loss,
)

from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.policy.qwen3_vl.config import Recompute, load_config, settings
from copd_megatron.weights.mapping import to_megatron

TEXT = [conversation(1, 9, [5, 3])]
ONE_IMAGE = [conversation(2, 5, [4, 6], [(1, 4, 8)])]
SEVERAL_SIZES = [
    conversation(3, 6, [5], [(1, 8, 4)]),
    conversation(4, 4, [3, 7], [(1, 4, 4)]),
    conversation(5, 5, [2], [(1, 10, 6)]),
]
SEVERAL_IMAGES = [conversation(6, 7, [6, 1, 4], [(1, 4, 8), (1, 2, 2), (1, 6, 4)])]
VIDEOS = [conversation(8, 6, [5, 2], [Video(3, 4, 6)]), conversation(9, 4, [3], [(1, 4, 4), Video(2, 6, 4), (1, 2, 2)])]
MIXED = [*TEXT, *SEVERAL_IMAGES, conversation(7, 12, [1, 8, 2, 5]), *VIDEOS, *SEVERAL_SIZES]


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.mark.parametrize(("tied", "deepstack"), [(True, (0,)), (False, (0, 1)), (True, ())])
@pytest.mark.parametrize(
    "conversations",
    [TEXT, ONE_IMAGE, SEVERAL_SIZES, SEVERAL_IMAGES, VIDEOS, MIXED],
    ids=["text", "image", "sizes", "images", "videos", "mixed"],
)
def test_logprobs_equal_transformers(
    layout: Layout, conversations: list[Conversation], tied: bool, deepstack: tuple[int, ...]
) -> None:
    hf = reference(config(tied, deepstack))
    model = build_model(hf.config, layout, "fp32")
    to_megatron(hf.state_dict(), model)

    with torch.no_grad():
        ours = model[0](pack(conversations)).log_softmax(-1)
        theirs = reference_logits(hf, conversations).log_softmax(-1)

    assert ours.shape == theirs.shape
    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_through_shared_prompts_equal_transformers(layout: Layout, recompute: Recompute) -> None:
    hf = reference(config(tied=True, deepstack=(0, 1)))
    gradients_equal_transformers(layout, hf, MIXED, recompute)


def test_bf16_is_as_close_to_fp32_as_transformers(layout: Layout) -> None:
    hf = reference(config(tied=False))
    with torch.no_grad():
        exact = reference_logits(hf, MIXED).log_softmax(-1)
        model = build_model(hf.config, layout, "bf16")
        to_megatron(hf.state_dict(), model)
        logits = model[0](pack(MIXED))
        theirs = reference_logits(hf.bfloat16(), MIXED).float().log_softmax(-1)

    assert logits.dtype == torch.bfloat16
    error = (logits.float().log_softmax(-1) - exact).abs().mean()
    assert error <= 1.2 * (theirs - exact).abs().mean()


def test_a_text_batch_leaves_the_vision_tower_alone(layout: Layout) -> None:
    model = build_model(config(), layout, "fp32")
    batch = pack(TEXT)

    token_loss(model[0](batch), batch).backward()

    without = {name.partition(".")[0] for name, parameter in model[0].named_parameters() if parameter.grad is None}
    assert without == {"vision"}


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"world": 3, "tp": 3}, "num_attention_heads = 4"),
        ({"world": 8, "tp": 8}, "num_attention_heads = 4"),
        ({"world": 3, "pp": 3}, "num_hidden_layers = 4"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(config(), Layout(**degrees), "fp32")


def test_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')

    with pytest.raises(WeightsError, match="model_type 'llama'"):
        load_config(tmp_path)


def test_a_published_config_file_is_understood(tmp_path: Path) -> None:
    """The form in which Qwen3-VL-4B-Instruct is published: rope_theta beside rope_scaling, no rope_parameters."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3_vl",
                "architectures": ["Qwen3VLForConditionalGeneration"],
                "tie_word_embeddings": True,
                "text_config": {
                    "model_type": "qwen3_vl_text",
                    "vocab_size": 151936,
                    "hidden_size": 2560,
                    "intermediate_size": 9728,
                    "num_hidden_layers": 36,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 8,
                    "head_dim": 128,
                    "rope_theta": 5000000,
                    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
                },
                "vision_config": {
                    "model_type": "qwen3_vl",
                    "depth": 24,
                    "hidden_size": 1024,
                    "intermediate_size": 4096,
                    "num_heads": 16,
                    "out_hidden_size": 2560,
                    "deepstack_visual_indexes": [5, 11, 17],
                },
            }
        )
    )

    found = settings(load_config(tmp_path), Layout(world=8, tp=4, pp=2), "bf16")

    assert (found.text.rope_theta, found.text.mrope_section, found.text.tied) == (5_000_000, (24, 20, 20), True)
    assert (found.text_config.num_query_groups, found.text_config.kv_channels) == (8, 128)
    assert found.vision.deepstack_layers == (5, 11, 17)
    assert (found.vision.position_grid, found.vision.patch_features) == (48, 1536)
    assert found.vision_config.kv_channels == 64
    assert found.vision_config.pipeline_model_parallel_size == 1


def test_layouts_pad_the_vocabulary_to_a_multiple() -> None:
    assert settings(config(), Layout(world=2, tp=2), "fp32").text.padded_vocab_size == 54
