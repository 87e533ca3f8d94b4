"""Models that take text alone, dense and with experts, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import gradients_equal_transformers
from tiny_qwen3_text import SHARED, TEXT, dense, published, sparse
from tiny_qwen3_vl import Conversation, alone, conversation, pack, reference, reference_logits

from copd_megatron.errors import ConfigError, DataError, WeightsError
from copd_megatron.policy.balance import Cost
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.policy.qwen3_vl.config import Recompute, load_config, settings
from copd_megatron.weights.mapping import to_megatron

MODELS = {
    "dense": dense(),
    "dense, untied": dense(tied=False),
    "experts": sparse(),
    "experts, tied, two dense layers": sparse([0, 2], tied=True),
}


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("conversations", [TEXT, SHARED], ids=["one", "shared"])
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


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
def test_gradients_through_shared_prompts_equal_transformers(
    layout: Layout, hf_config: Any, recompute: Recompute
) -> None:
    hf = reference(hf_config)
    gradients_equal_transformers(layout, hf, SHARED, recompute, published)


def test_images_are_refused(layout: Layout) -> None:
    model = build_model(dense(), layout, "fp32")
    batch = pack([conversation(2, 5, [4], [(1, 4, 8)])])

    with pytest.raises(DataError, match="images or videos, but a 'qwen3' takes text alone"):
        model[0](batch)


def test_a_model_without_a_tower_spends_nothing_on_patches() -> None:
    built = settings(dense(), Layout(), "fp32")

    assert (built.vision, built.vision_config) == (None, None)
    cost = Cost.of(built)
    assert cost == replace(cost, patch=0.0, patch_pair=0.0)
    assert cost.token == 2 * 4 * 104 * (2 * 120 + 2 * 40 + 3 * 148)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 2}, r"^use_sliding_window is true"),
        ({"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, r"^layer_types names sliding_attention"),
        ({"attention_bias": True}, r"^attention_bias is true"),
        ({"hidden_act": "relu"}, r"^hidden_act is 'relu'"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
            r"^rope_parameters: rope_type 'yarn' is not supported",
        ),
    ],
)
def test_what_released_models_do_not_use_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(dense(**options), Layout(), "fp32")


@pytest.mark.parametrize(
    ("hf_config", "degrees", "message"),
    [
        (dense(), {"world": 3, "tp": 3}, r"divide num_key_value_heads = 2"),
        (dense(), {"world": 3, "pp": 3}, r"divide num_hidden_layers = 4"),
        (dense(), {"world": 2, "ep": 2}, r"divides experts, and a 'qwen3' has none"),
        (sparse(), {"world": 3, "ep": 3}, r"divide num_experts = 4"),
        (sparse(), {"world": 2, "tp": 2}, r"without sequence parallelism"),
        (sparse(use_sliding_window=True), {}, r"^use_sliding_window is true"),
        (sparse(norm_topk_prob=False), {}, r"^norm_topk_prob is false"),
        (sparse(range(4)), {}, r"mlp_only_layers \[0, 1, 2, 3\] no layer has experts; .* model_type 'qwen3'"),
    ],
)
def test_what_does_not_fit_is_refused(hf_config: Any, degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(hf_config, Layout(**degrees), "fp32")


def test_an_unknown_family_is_told_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')

    with pytest.raises(WeightsError, match=r"model_type 'qwen2'; .* 'qwen3_vl', 'qwen3_vl_moe', 'qwen3', 'qwen3_moe'"):
        build_model(tmp_path, Layout(), "fp32")


def test_published_config_files_are_understood(tmp_path: Path) -> None:
    """The form in which Qwen3-8B and Qwen3-30B-A3B are published."""
    content = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "model_type": "qwen3",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(content))

    found = settings(load_config(tmp_path), Layout(world=8, tp=4, pp=2), "bf16")

    assert (found.family, found.text.rope_theta, found.text.tied) == ("qwen3", 1_000_000, False)
    assert (found.text_config.kv_channels, found.text_config.num_query_groups) == (128, 8)
    assert found.text.mrope_section == (64, 0, 0)

    experts = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    (tmp_path / "config.json").write_text(json.dumps({**content, **experts}))
    layout = Layout(world=32, tp=4, pp=2, ep=8, etp=1, sequence_parallel=True)

    found = settings(load_config(tmp_path), layout, "bf16")

    assert (found.family, found.text_config.num_moe_experts) == ("qwen3_moe", 128)
    assert (found.text_config.moe_router_topk, found.text_config.moe_ffn_hidden_size) == (8, 768)
