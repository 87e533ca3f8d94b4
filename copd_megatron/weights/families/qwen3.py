"""Dense Qwen3, text alone: `Qwen3ForCausalLM` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel` without a tower."""

from __future__ import annotations

from typing import TYPE_CHECKING

from copd_megatron.weights.families.decoder import around_layers, dense_layers
from copd_megatron.weights.families.row import Section

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

LANGUAGE = "model."


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    return around_layers(settings, LANGUAGE, dense_layers(settings, LANGUAGE))
