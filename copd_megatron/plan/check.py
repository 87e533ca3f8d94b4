"""The plan of a micro-batch's memory beside torch's own count, on a model that this process can hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from copd_megatron.objectives.vocabulary import token_logprobs
from copd_megatron.plan.activations import Recompute, kept
from copd_megatron.plan.geometry import Geometry
from copd_megatron.plan.measure import Peak, kept_bytes
from copd_megatron.plan.packing import Packing
from copd_megatron.policy.degrees import Layout
from copd_megatron.policy.packed import MicroBatch


@dataclass(frozen=True)
class Comparison:
    """Bytes that autograd keeps after a forward pass, and the peak of a forward and backward pass; without weights and
    gradients."""

    kept_planned: float
    kept_measured: float
    peak_planned: float
    peak_measured: float


def packing_of(batch: MicroBatch) -> Packing:
    """The shape of a real micro-batch."""
    frames = [] if batch.grid_thw is None else batch.grid_thw.tolist()
    return Packing(
        prompts=tuple(batch.segments.prompt_lengths.tolist()),
        responses=tuple((batch.segments.response_lengths + 1).tolist()),
        prompt_of=tuple(batch.segments.prompt_of.tolist()),
        frames=tuple(height * width for count, height, width in frames for _ in range(count)),
    )


def compare(model: Any, batch: MicroBatch, layout: Layout, recompute: Recompute, backward: bool = True) -> Comparison:
    """Of `model`, the only pipeline stage, on `batch`; the batch is this rank's share, its shape that of the whole."""
    geometry = Geometry.of(Geometry.described(model.settings))
    parameters = list(model.parameters())
    number = parameters[0].element_size()
    planned = kept(geometry, layout, packing_of(batch), number, recompute)
    saved = geometry.layers * planned.layer + planned.stage + planned.first + planned.head
    measured, logits = kept_bytes(lambda: model(batch), parameters)
    del logits
    peak = 0
    if backward:
        for parameter in parameters:
            parameter.grad = parameter.new_zeros(parameter.shape)
        with Peak([*parameters, *(parameter.grad for parameter in parameters)]) as tracked:
            token_logprobs(model(batch), batch.targets, 1.0, model.vocabulary).sum().backward()
        peak = tracked.bytes
    at_once = max(planned.logits, planned.rebuilt, planned.rebuilt_first)
    return Comparison(saved, measured, saved + planned.held + at_once, peak)
