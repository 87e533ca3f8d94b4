"""Qwen3 with experts, text alone: `Qwen3MoeForCausalLM` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel` without a
tower.

Files hold one tensor per expert and projection; transformers 5 stacks them in memory and saves them as published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copd_megatron.weights.families.decoder import around_layers, expert_names, mixed_layers, router
from copd_megatron.weights.families.qwen3 import LANGUAGE
from copd_megatron.weights.families.row import EachExpert, Row, Section

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    experts = router(LANGUAGE) + _experts(settings.hf.num_experts)
    return around_layers(settings, LANGUAGE, mixed_layers(settings, LANGUAGE, experts))


def _experts(count: int) -> tuple[Row, ...]:
    def names(*projections: str) -> tuple[str, ...]:
        return tuple(
            f"{LANGUAGE}layers.*.mlp.experts.{number}.{projection}_proj.weight"
            for number in range(count)
            for projection in projections
        )

    return (
        Row(expert_names("linear_fc1"), names("gate", "up"), EachExpert(2), shard=0, blocks=2, experts=count),
        Row(expert_names("linear_fc2"), names("down"), EachExpert(1), shard=1, experts=count),
    )
