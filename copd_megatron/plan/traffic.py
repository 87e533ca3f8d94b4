"""Bytes that collectives, hand-overs and teachers' scores move, and how long that takes.

Bytes are those that one rank sends, and receives, in one update. A collective whose group lies within a node goes over
NVLink, any other over the network; ranks are numbered tp first, then cp, dp, pp.
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.run import RunConfig
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.geometry import Geometry
from copd_megatron.plan.hardware import GPUS_PER_NODE, Gpu
from copd_megatron.plan.shards import Shards
from copd_megatron.plan.workload import Update
from copd_megatron.policy.degrees import Layout


@dataclass(frozen=True)
class Transfer:
    """`bytes` per rank and update over groups of `ranks`, `seconds` of them; `hidden` ones run beside computing."""

    name: str
    ranks: int
    bytes: float
    seconds: float
    hidden: bool = False


def collectives(
    shards: Shards, layout: Layout, config: RunConfig, update: Update, gpu: Gpu, assumed: Assumptions
) -> list[Transfer]:
    """Of one update, on the busiest rank."""
    geometry = shards.geometry
    number = 2 if config.precision.params == "bf16" else 4
    tokens = sum(portion.packed_tokens for portion in update.portions) / layout.dp / layout.cp
    layers = geometry.layers / layout.pp
    again = config.precision.recompute == "full"
    span = layout.tp * layout.cp * layout.dp
    found = [
        _transfer("TP", layout.tp, layout.tp, _tensor(geometry, layout, tokens, layers, number, again), gpu, assumed),
        _transfer(
            "CP",
            layout.cp,
            layout.tp * layout.cp,
            _context(geometry, layout, tokens, layers, number, again),
            gpu,
            assumed,
        ),
        _transfer(
            "EP",
            layout.ep,
            layout.ep * layout.expert_tp,
            _expert(geometry, layout, tokens, number, again),
            gpu,
            assumed,
        ),
        _transfer("PP", layout.pp, span * layout.pp, _pipeline(geometry, layout, tokens, number), gpu, assumed),
    ]
    stage = max(shards.stages, key=lambda one: one.parameters)
    hidden = config.optimizer.overlap_grad_reduce
    dense = _reduced(stage.dense, layout.dp * layout.cp, number)
    experts = layout.world // (layout.ep * layout.expert_tp * layout.pp)
    expert = _reduced(stage.expert, experts, number)
    found.append(_transfer("DP", layout.dp * layout.cp, span, dense, gpu, assumed, hidden))
    if geometry.experts:
        found.append(_transfer("DP of experts", experts, span if experts > 1 else 1, expert, gpu, assumed, hidden))
    return [transfer for transfer in found if transfer.ranks > 1]


def _tensor(geometry: Geometry, layout: Layout, tokens: float, layers: float, number: int, again: bool) -> float:
    """Per layer, forward and backward: two gathers and two scatters each with sequence parallelism and two gathers more
    in the backward pass; two sums of twice the size each without."""
    whole = tokens * geometry.hidden * number * (layout.tp - 1) / layout.tp
    times = (4 + 6 if layout.sequence_parallel else 4 + 4) + (4 if again else 0)
    return layers * whole * times


def _context(geometry: Geometry, layout: Layout, tokens: float, layers: float, number: int, again: bool) -> float:
    """Keys and values of all ranks' tokens, and their gradients back."""
    own = tokens * 2 * geometry.key / layout.tp * number
    return layers * own * (layout.cp - 1) * (3 if again else 2)


def _expert(geometry: Geometry, layout: Layout, tokens: float, number: int, again: bool) -> float:
    """Tokens to their experts and back, forward and backward."""
    shared = tokens / layout.tp if layout.sequence_parallel else tokens
    sent = shared * geometry.chosen * geometry.hidden * number * (layout.ep - 1) / layout.ep
    return geometry.sparse_layers / layout.pp * sent * (6 if again else 4)


def _pipeline(geometry: Geometry, layout: Layout, tokens: float, number: int) -> float:
    """Hidden states to the next stage and their gradients back, once per virtual stage."""
    shared = tokens / layout.tp if layout.sequence_parallel else tokens
    return 2 * shared * geometry.hidden * number * layout.vpp


def _reduced(parameters: float, ranks: int, number: int) -> float:
    """Gradients in float32, summed and scattered, and weights gathered."""
    return parameters * (4 + number) * (ranks - 1) / max(1, ranks)


def _transfer(
    name: str, ranks: int, span: int, moved: float, gpu: Gpu, assumed: Assumptions, hidden: bool = False
) -> Transfer:
    """`span`: ranks from the first to the last of a group, all those between included."""
    link = gpu.nvlink if span <= GPUS_PER_NODE else gpu.network
    return Transfer(name, ranks, moved, moved / (link * assumed.link_efficiency), hidden)


def hand_over(shards: Shards, config: RunConfig, servers: int, gpu: Gpu, assumed: Assumptions) -> Transfer:
    """Weights from rank 0 to all servers of the branch after an update. Over process groups rank 0 sends to every
    server by itself; through shared memory or files servers read the same copy."""
    number = 2 if config.precision.params == "bf16" else 4
    whole = float(shards.total * number)
    own = {"broadcast": gpu.network, "shared_memory": gpu.nvlink, "files": assumed.disk_bandwidth}
    over = own[config.rollout.sglang.transport] if config.rollout.engine == "sglang" else gpu.nvlink
    copies = servers if config.rollout.sglang.transport == "broadcast" else 1
    gathered = whole / (gpu.network * assumed.hand_over_efficiency) if _several_nodes(config) else 0.0
    seconds = assumed.hand_over_seconds + gathered + copies * whole / (over * assumed.hand_over_efficiency)
    return Transfer("hand-over", servers, whole * copies, seconds)


def _several_nodes(config: RunConfig) -> bool:
    return any(branch.parallel.world > GPUS_PER_NODE for branch in config.trained)


def scoring_bytes(update: Update, config: RunConfig, patch_features: int, assumed: Assumptions) -> tuple[float, float]:
    """What one Phase II step of a branch moves for its teachers: (answers with scores, requests with media)."""
    answered = sent = 0.0
    for portion in update.cross.values():
        answered += portion.response_tokens * (assumed.score_bytes + config.opd.top_k * assumed.score_entry_bytes)
        # Ids as decimal numbers; patches as one byte per value, with every rollout.
        media = portion.rollouts * portion.capability.visual * 4 * patch_features
        sent += portion.sequence_tokens * 7 + media
    return answered, sent
