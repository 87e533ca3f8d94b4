"""Qwen3-VL with experts: `Qwen3VLMoeForConditionalGeneration` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from copd_megatron.weights.families.decoder import around_layers, expert_names, mixed_layers, router
from copd_megatron.weights.families.qwen3_vl import LANGUAGE, tower
from copd_megatron.weights.families.row import ExpertStack, Row, Section

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    text = settings.hf.text_config
    experts = router(LANGUAGE) + _experts(text.num_experts, text.hidden_size, text.moe_intermediate_size)
    return around_layers(settings, LANGUAGE, mixed_layers(settings, LANGUAGE, experts), tower(settings))


def _experts(count: int, hidden: int, inner: int) -> tuple[Row, ...]:
    h = LANGUAGE + "layers.*."
    return (
        Row(
            expert_names("linear_fc1"),
            (h + GATE_UP,),
            ExpertStack(hidden, 2 * inner),
            shard=0,
            blocks=2,
            experts=count,
        ),
        Row(expert_names("linear_fc2"), (h + DOWN,), ExpertStack(inner, hidden), shard=1, experts=count),
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
