"""What a forward pass keeps for the backward pass, tensor by tensor as our layers save them.

Sizes are bytes on one rank. Checked against torch's own count of a real forward pass (measure.py, docs/scale.md): on a
CPU. Transformer Engine's layers keep tensors of the same sizes in other places: not measured.

T tokens of the micro-batch, t = T / cp of them on this rank, n = t / tp where sequence parallelism divides norms and
residuals (else t), H hidden, Q features of all heads, K of all groups, F of the MLP, b bytes of a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copd_megatron.plan.geometry import Geometry, Tower
from copd_megatron.plan.packing import Call, Packing
from copd_megatron.policy.degrees import Layout

Recompute = Literal["none", "selective", "full"]

_STATISTIC = 4
"""Bytes of a float32."""
_INDEX = 8
"""Bytes of an int64."""


@dataclass(frozen=True)
class Kept:
    """Of one micro-batch on one rank: `layer` per decoder layer, `stage` once per stage, `first` more on the stage with
    embedding and vision tower, `head` more on the last one. `held` is not saved by autograd, but by the layers' plan of
    attention as long as the graph is there. `rebuilt` is what a layer needs while the backward pass is in it, and what
    it computed again, `rebuilt_first` the same of the tower; `logits` and their gradient are there after the forward
    pass of the last stage."""

    layer: float
    stage: float
    held: float
    first: float
    head: float
    rebuilt: float
    rebuilt_first: float
    logits: float


def kept(
    geometry: Geometry, layout: Layout, packing: Packing, number: int, recompute: Recompute, imbalance: float = 1.0
) -> Kept:
    """`number`: bytes of a weight or an activation. `imbalance`: tokens of the busiest experts to the mean."""
    tokens = -(-packing.tokens // layout.cp)
    shared = -(-tokens // layout.tp) if layout.sequence_parallel else tokens
    whole = decoder_layer(geometry, layout, packing, number, imbalance)
    core = core_attention(geometry, layout, packing, number)
    passed_on = shared * geometry.hidden * number  # what enters a layer
    per_layer = {
        "none": whole,
        # Query, key, and value as a view of what the three were split from.
        "selective": whole - core + tokens * (2 * geometry.query + 3 * geometry.key) / layout.tp * number,
        "full": passed_on,
    }[recompute]
    # Gradients on their way through the MLP: of what each of its matrices takes and gives.
    if geometry.sparse_layers:
        width = 3 * geometry.expert_ffn / layout.expert_tp + 2 * geometry.hidden
        passing = shared * geometry.chosen * layout.expert_tp * width * number
    else:
        passing = tokens * 3 * geometry.ffn / layout.tp * number
    # Attention that is computed again is gone before the MLP's gradients come.
    rebuilt = {"none": passing, "selective": max(core, passing), "full": whole + passing}[recompute] + 2 * passed_on
    predicted = -(-packing.predicted // layout.cp)
    waves = 2 * tokens * geometry.query // geometry.heads * number
    saved = recompute != "full"
    held = sum(call.mask for call in packing.calls(layout.cp)) + (0.0 if saved else waves)
    first, rebuilt_first = _tower(geometry, layout, packing, number, recompute)
    return Kept(
        layer=per_layer,
        stage=waves + 3 * _INDEX * tokens if saved else 0.0,
        held=held,
        # A rank's share of the embedded tokens is a view of all of them.
        first=first + _INDEX * tokens + (tokens - shared) * geometry.hidden * number,
        head=shared * (geometry.hidden * number + _STATISTIC) + predicted * (geometry.hidden * number + _INDEX),
        rebuilt=rebuilt,
        rebuilt_first=rebuilt_first,
        logits=2 * predicted * geometry.vocab / layout.tp * number,
    )


def decoder_layer(geometry: Geometry, layout: Layout, packing: Packing, number: int, imbalance: float = 1.0) -> float:
    """Of one layer that recomputes nothing."""
    tokens = -(-packing.tokens // layout.cp)
    shared = -(-tokens // layout.tp) if layout.sequence_parallel else tokens
    query, key = geometry.query / layout.tp, geometry.key / layout.tp
    heads = (geometry.heads + geometry.groups) / layout.tp
    norms = 2 * shared * (geometry.hidden * number + _STATISTIC)
    inputs = 2 * shared * geometry.hidden * number  # of the products behind the norms
    head_norms = tokens * ((query + key) * number + heads * _STATISTIC)
    output = tokens * query * number  # of attention, which the next product keeps
    return (
        norms
        + inputs
        + head_norms
        + output
        + core_attention(geometry, layout, packing, number)
        + _mlp(geometry, layout, tokens, shared, number, imbalance)
    )


def core_attention(geometry: Geometry, layout: Layout, packing: Packing, number: int) -> float:
    """Queries, keys, values and outputs in rows, the mask in the activations' format, and the log of the sums."""
    query, key, heads = geometry.query / layout.tp, geometry.key / layout.tp, geometry.heads / layout.tp
    calls = packing.calls(layout.cp)
    total = sum(_attention(call, query, key, heads, number) for call in calls)
    if any(call.whole for call in calls):  # views keep the tensor that they are of, once
        total += -(-packing.tokens // layout.cp) * (query + key) * number
    return total


def _attention(call: Call, query: float, key: float, heads: float, number: int) -> float:
    own = 0.0 if call.whole else call.query_slots * query + call.key_slots * key
    rows = own + call.query_slots * query + call.key_slots * key
    return (rows + call.mask) * number + call.query_slots * heads * _STATISTIC


def _mlp(geometry: Geometry, layout: Layout, tokens: int, shared: int, number: int, imbalance: float) -> float:
    if not geometry.sparse_layers:
        return tokens * 4 * geometry.ffn / layout.tp * number  # gate and up, silu(gate), their product
    chosen, experts = geometry.chosen, geometry.experts
    routing = shared * (chosen * (2 * _INDEX + 2 * _STATISTIC) + experts * (1 + _STATISTIC))
    # Gate and up, silu(gate), product, product times probability, and the input.
    features = geometry.hidden + 5 * geometry.expert_ffn / layout.expert_tp
    busiest = imbalance if layout.ep > 1 else 1.0
    return routing + shared * chosen * layout.expert_tp * busiest * (features * number + 2 * _STATISTIC)


def _tower(
    geometry: Geometry, layout: Layout, packing: Packing, number: int, recompute: Recompute
) -> tuple[float, float]:
    """What the tower keeps, and what recomputing one of its layers needs."""
    tower, patches = geometry.tower, packing.patches
    if tower is None or not patches:
        return 0.0, 0.0
    layer = _tower_layer(tower, layout, packing, number)
    core = sum(
        _attention(call, tower.hidden / layout.tp, tower.hidden / layout.tp, tower.heads / layout.tp, number)
        for call in packing.frame_calls()
    )
    each = {
        "none": layer,
        "selective": layer - core + 4 * patches * tower.hidden / layout.tp * number,
        "full": patches * tower.hidden * number,
    }[recompute]
    merged = patches // tower.merge**2
    mergers = (1 + tower.taps) * merged * (tower.joined + 2 * tower.joined / layout.tp) * number
    ends = patches * (tower.hidden + tower.patch_features) * number + patches * 6 * _INDEX
    features = (1 + tower.taps) * merged * geometry.hidden * number
    return tower.layers * each + mergers + ends + features, 0.0 if recompute == "none" else layer


def _tower_layer(tower: Tower, layout: Layout, packing: Packing, number: int) -> float:
    patches, hidden = packing.patches, tower.hidden
    norms = patches * (4 * hidden * number + 4 * _STATISTIC)  # inputs of both norms and of the products behind them
    calls = packing.frame_calls()
    attention = sum(
        _attention(call, hidden / layout.tp, hidden / layout.tp, tower.heads / layout.tp, number) for call in calls
    )
    if any(call.whole for call in calls):
        attention += 2 * patches * hidden / layout.tp * number
    else:
        attention += patches * hidden / layout.tp * number  # back in order, which the next product keeps
    return norms + attention + patches * (4 if tower.gated else 2) * tower.ffn / layout.tp * number
