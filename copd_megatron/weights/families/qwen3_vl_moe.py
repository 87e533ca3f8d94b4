"""Qwen3-VL with experts: `Qwen3VLMoeForConditionalGeneration` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from copd_megatron.weights.families.qwen3_vl import HF_LAYER, LAYER, around_layers, attention, mlp
from copd_megatron.weights.families.row import ExpertStack, Row, Section

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    from copd_megatron.policy.qwen3_vl.moe import has_experts

    config = settings.text_config
    own = attention(config.num_attention_heads, config.num_query_groups)
    text = settings.hf.text_config
    sparse = own + _experts(text.num_experts, text.hidden_size, text.moe_intermediate_size)
    dense = own + mlp()
    layers = (
        Section(1, sparse if has_experts(config, number) else dense, number) for number in range(config.num_layers)
    )
    return around_layers(settings, tuple(layers))


def _experts(count: int, hidden: int, inner: int) -> tuple[Row, ...]:
    m, h = LAYER, HF_LAYER
    one, grouped = m + "mlp.experts.local_experts.#.", m + "mlp.experts."
    return (
        Row(m + "pre_mlp_layernorm.weight", (h + "post_attention_layernorm.weight",)),
        Row(m + "mlp.router.weight", (h + "mlp.gate.weight",)),
        Row(
            (one + "linear_fc1.weight", grouped + "linear_fc1.weight#"),
            (h + GATE_UP,),
            ExpertStack(hidden, 2 * inner),
            shard=0,
            blocks=2,
            experts=count,
        ),
        Row(
            (one + "linear_fc2.weight", grouped + "linear_fc2.weight#"),
            (h + DOWN,),
            ExpertStack(inner, hidden),
            shard=1,
            experts=count,
        ),
    )


def as_published(name: str, tensor: Tensor, config: dict[str, Any]) -> Tensor:
    """`tensor` of a Hugging Face folder with the config.json `config`, the way round that Qwen publishes it.

    transformers 5 saves the matrices of experts transposed, under the same names.
    """
    text = config.get("text_config")
    if config.get("model_type") != "qwen3_vl_moe" or not isinstance(text, dict):
        return tensor
    hidden, inner = text.get("hidden_size"), text.get("moe_intermediate_size")
    for ending, inputs in ((GATE_UP, hidden), (DOWN, inner)):
        if name.endswith(ending) and tensor.dim() == 3 and tensor.shape[1] != inputs == tensor.shape[2]:
            return tensor.transpose(1, 2)
    return tensor
