from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import gradients_equal_transformers
from tiny_qwen3_vl import (
    Conversation,
    Video,
    alone,
    config,
    conversation,
    moe_config,
    pack,
    reference,
    reference_logits,
    token_loss,
)

from copd_megatron.errors import ConfigError
from copd_megatron.policy.elementwise import RMSNorm
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.policy.qwen3_vl.config import Recompute, load_config, settings
from copd_megatron.policy.qwen3_vl.moe import has_experts
from copd_megatron.weights.mapping import to_megatron

TEXT = [conversation(1, 9, [5, 3])]
MIXED = [
    conversation(6, 7, [6, 1, 4], [(1, 4, 8), (1, 2, 2), (1, 6, 4)]),
    conversation(7, 12, [1, 8, 2, 5]),
    conversation(3, 6, [5], [(1, 8, 4)]),
    conversation(9, 4, [3, 2], [(1, 4, 4), Video(2, 6, 4), (1, 2, 2)]),
]
LAYOUT = {
    "every layer": {},
    "one dense layer": {"dense": [1]},
    "every other layer": {"decoder_sparse_step": 2},
    "many small experts": {"experts": 12, "num_experts_per_tok": 5},
}


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.mark.parametrize("options", LAYOUT.values(), ids=LAYOUT)
@pytest.mark.parametrize("conversations", [TEXT, MIXED], ids=["text", "mixed"])
def test_logprobs_equal_transformers(
    layout: Layout, conversations: list[Conversation], options: dict[str, Any]
) -> None:
    hf = reference(moe_config(**options))
    model = build_model(hf.config, layout, "fp32")
    to_megatron(hf.state_dict(), model)

    with torch.no_grad():
        ours = model[0](pack(conversations)).log_softmax(-1)
        theirs = reference_logits(hf, conversations).log_softmax(-1)

    assert theirs.std() > 0.3
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_of_experts_and_router_equal_transformers(layout: Layout, recompute: Recompute) -> None:
    hf = reference(moe_config(dense=[2]))

    def published(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.transpose(1, 2) if "experts" in name else tensor for name, tensor in named.items()}

    gradients_equal_transformers(layout, hf, MIXED, recompute, published)


def test_bf16_is_as_close_to_fp32_as_transformers(layout: Layout) -> None:
    hf = reference(moe_config())
    with torch.no_grad():
        exact = reference_logits(hf, MIXED).log_softmax(-1)
        model = build_model(hf.config, layout, "bf16")
        to_megatron(hf.state_dict(), model)
        ours = model[0](pack(MIXED)).float().log_softmax(-1)
        theirs = reference_logits(hf.bfloat16(), MIXED).float().log_softmax(-1)

    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


def test_the_loss_has_no_balancing_term(layout: Layout) -> None:
    hf = reference(moe_config(router_aux_loss_coef=10.0, output_router_logits=True))
    model = build_model(hf.config, layout, "fp32")
    to_megatron(hf.state_dict(), model)
    batch = pack(TEXT)

    (0 * token_loss(model[0](batch), batch)).backward()

    assert all(not parameter.grad.any() for name, parameter in model[0].named_parameters() if "router" in name)


@pytest.mark.parametrize(
    ("options", "sparse"),
    [({}, [0, 1, 2, 3]), ({"dense": [0, 2]}, [1, 3]), ({"decoder_sparse_step": 3}, [2])],
)
def test_layers_with_experts_are_those_of_transformers(options: dict[str, Any], sparse: list[int]) -> None:
    hf = moe_config(**options)

    found = settings(hf, Layout(), "fp32")

    assert [layer for layer in range(4) if has_experts(found.text_config, layer)] == sparse
    modules = reference(hf).model.language_model.layers
    assert [layer for layer in range(4) if hasattr(modules[layer].mlp, "experts")] == sparse
    assert found.family == "qwen3_vl_moe"
    assert settings(config(), Layout(), "fp32").family == "qwen3_vl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts_per_tok": 1}, r"num_experts_per_tok is 1; expected 2 to 4"),
        ({"num_experts_per_tok": 5}, r"num_experts_per_tok is 5; expected 2 to 4"),
        ({"norm_topk_prob": False}, r"norm_topk_prob is false"),
        ({"decoder_sparse_step": 0}, r"decoder_sparse_step is 0"),
        ({"dense": [4]}, r"mlp_only_layers names layers \[4\]; the model has layers 0 to 3"),
        ({"dense": [0, 1, 2, 3]}, r"no layer has experts; a dense model has the model_type 'qwen3_vl'"),
        ({"moe_intermediate_size": 64}, r"hidden_size = 128 makes an expert's matrices square"),
        ({"moe_intermediate_size": 128}, r"hidden_size = 128 makes an expert's matrices square"),
    ],
)
def test_models_that_cannot_be_trained_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(moe_config(**options), Layout(), "fp32")


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"world": 3, "ep": 3}, r"parallel\.ep = 3 does not divide text_config\.num_experts = 4"),
        ({"world": 2, "tp": 2}, r"parallel\.tp = 2 without sequence parallelism"),
        ({"world": 2, "tp": 2, "sequence_parallel": True, "etp": 1}, r"parallel\.etp = 1 differs from tp = 2"),
        ({"world": 64, "ep": 2, "etp": 32}, r"parallel\.etp = 32 does not divide text_config\.moe_inter.* = 48"),
        ({"world": 6, "pp": 2, "vpp": 3}, r"parallel\.pp × vpp = 2 × 3 does not divide .*num_hidden_layers = 4"),
    ],
)
def test_layouts_that_do_not_divide_the_experts_are_refused(degrees: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(moe_config(), Layout(**degrees), "fp32")


def test_experts_are_not_divided_where_there_are_none() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2 divides experts, and a 'qwen3_vl' has none"):
        settings(config(), Layout(world=2, ep=2), "fp32")


def test_a_published_config_file_is_understood(tmp_path: Path) -> None:
    """The form in which Qwen3-VL-30B-A3B-Instruct is published."""
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "qwen3_vl_moe",
                "architectures": ["Qwen3VLMoeForConditionalGeneration"],
                "tie_word_embeddings": False,
                "text_config": {
                    "model_type": "qwen3_vl_moe_text",
                    "vocab_size": 151936,
                    "hidden_size": 2048,
                    "intermediate_size": 6144,
                    "moe_intermediate_size": 768,
                    "num_experts": 128,
                    "num_experts_per_tok": 8,
                    "norm_topk_prob": True,
                    "decoder_sparse_step": 1,
                    "mlp_only_layers": [],
                    "num_hidden_layers": 48,
                    "num_attention_heads": 32,
                    "num_key_value_heads": 4,
                    "head_dim": 128,
                    "rope_theta": 5000000,
                    "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
                },
                "vision_config": {
                    "model_type": "qwen3_vl_moe",
                    "depth": 27,
                    "hidden_size": 1152,
                    "intermediate_size": 4304,
                    "num_heads": 16,
                    "out_hidden_size": 2048,
                    "deepstack_visual_indexes": [8, 16, 24],
                },
            }
        )
    )
    layout = Layout(world=32, tp=4, pp=2, ep=8, etp=1, sequence_parallel=True)

    found = settings(load_config(tmp_path), layout, "bf16").text_config

    assert (found.num_moe_experts, found.moe_router_topk, found.moe_ffn_hidden_size) == (128, 8, 768)
    assert (found.expert_model_parallel_size, found.expert_tensor_parallel_size) == (8, 1)
    assert found.moe_layer_freq == 1
    assert (found.moe_router_dtype, found.moe_aux_loss_coeff) == ("fp32", 0.0)


def test_norms_of_divided_sequences_are_marked() -> None:
    """megatron-core adds up their gradients over tensor parallel ranks by this mark."""
    divided = settings(moe_config(), Layout(world=2, tp=2, sequence_parallel=True), "fp32")

    assert RMSNorm(divided.text_config, 8).weight.sequence_parallel
    assert not RMSNorm(settings(moe_config(), Layout(), "fp32").text_config, 8).weight.sequence_parallel
    assert not divided.vision_config.sequence_parallel
