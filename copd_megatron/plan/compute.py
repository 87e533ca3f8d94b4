"""Operations of training, how evenly pipeline stages share them, and how long they take."""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.run import RunConfig
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.geometry import Geometry
from copd_megatron.plan.hardware import Gpu
from copd_megatron.plan.shards import Shards
from copd_megatron.plan.workload import Update
from copd_megatron.policy.degrees import Layout


@dataclass(frozen=True)
class Training:
    """One update's forward and backward passes. `operations` over the whole gang, recomputed ones included;
    `model_operations` without these, which MFU counts. `bubble`: share of the time in which a stage waits for the
    pipeline to fill and drain; `balance`: mean to largest of the stages' work."""

    operations: float
    model_operations: float
    seconds: float
    microbatches: int
    bubble: float
    balance: float


def bubble_share(pp: int, vpp: int, microbatches: int) -> float:
    """Share of a pipeline's time that filling and draining it takes: (p − 1) / (v·m + p − 1)."""
    return (pp - 1) / (vpp * microbatches + pp - 1)


def training(
    shards: Shards, layout: Layout, config: RunConfig, update: Update, microbatches: int, gpu: Gpu, assumed: Assumptions
) -> Training:
    """Of one update on the branch's gang."""
    geometry = shards.geometry
    products, attention = (
        sum(part) for part in zip(*(portion.operations(geometry) for portion in update.portions), strict=True)
    )
    passes = {"none": (3, 3), "selective": (3, 4), "full": (4, 4)}[config.precision.recompute]
    peak = gpu.fp8 if config.precision.fp8 != "none" else gpu.bf16
    tokens = sum(portion.packed_tokens for portion in update.portions)
    expert = 6.0 * geometry.sparse_layers * geometry.hidden * geometry.expert_ffn * geometry.chosen * tokens
    busy = passes[0] * (
        (products - expert) / (peak * assumed.training_efficiency)
        + expert * (assumed.expert_imbalance if layout.ep > 1 else 1) / (peak * assumed.expert_efficiency)
    ) + passes[1] * attention / (gpu.bf16 * assumed.attention_efficiency)
    bubble = bubble_share(layout.pp, layout.vpp, microbatches)
    balance = stage_balance(shards, update)
    return Training(
        operations=passes[0] * products + passes[1] * attention,
        model_operations=3 * (products + attention),
        seconds=busy / layout.world / balance / (1 - bubble),
        microbatches=microbatches,
        bubble=bubble,
        balance=balance,
    )


def stage_balance(shards: Shards, update: Update) -> float:
    """Mean to largest of what the stages compute: the first has the vision tower, the last the output layer."""
    work = _by_stage(shards.geometry, [stage.layers for stage in shards.stages], update)
    return sum(work) / len(work) / max(work)


def _by_stage(geometry: Geometry, layers: list[int], update: Update) -> list[float]:
    decoder = sum(
        geometry.cost_token * portion.packed_tokens + geometry.cost_pair * portion.pairs()
        for portion in update.portions
    )
    head = sum(2.0 * geometry.hidden * geometry.vocab * portion.response_tokens for portion in update.portions)
    whole = sum(sum(portion.operations(geometry)) for portion in update.portions)
    work = [decoder * count / geometry.layers for count in layers]
    work[0] += whole - decoder - head
    work[-1] += head
    return work


def forward_operations(geometry: Geometry, tokens: float, pairs: float, patches: float, frame: int) -> float:
    """An engine's forward pass over given tokens, without logits."""
    tower = geometry.tower
    seen = 0.0 if tower is None else patches * (tower.cost_patch + tower.cost_pair * frame)
    return geometry.cost_token * tokens + geometry.cost_pair * pairs + seen
