"""Memory of every kind of rank: what is always there, and what comes on top while it trains, samples or hands over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from copd_megatron.config.run import RunConfig
from copd_megatron.plan.activations import Kept, kept
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.engines import Fleet, weight_bytes
from copd_megatron.plan.hardware import Gpu
from copd_megatron.plan.packing import Packing
from copd_megatron.plan.shards import Shards, Stage
from copd_megatron.policy.degrees import Layout

MOMENTS = 8
"""Bytes per parameter of AdamW's two moments."""
MASTER = 4
"""Bytes of a float32 copy of a bfloat16 parameter."""
GRADIENT = 4
"""Gradients are added up in float32."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one GPU of a pipeline stage. `engine` and `cache` are those of a server on the same GPU, which has as
    much cache as is left over; `host` is what the rank keeps in host memory."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    resident: float
    activations: float
    recomputed: float
    logits: float
    fragmentation: float
    runtime: float
    buckets: float
    engine: float
    engine_asleep: float
    cache: float
    host: float
    packing: str

    @property
    def static(self) -> float:
        """What the policy holds all the time."""
        return self.weights + self.gradients + self.optimizer + self.resident + self.runtime

    @property
    def training(self) -> float:
        """While the policy trains, and the engine sleeps where it can."""
        peak = self.activations + max(self.recomputed, self.logits) + self.fragmentation
        return self.static + peak + self.engine_asleep

    @property
    def sampling(self) -> float:
        """While the engine samples, with all the cache it gets."""
        return self.static + self.engine + self.cache

    @property
    def handing_over(self) -> float:
        """While weights go to engines."""
        return self.static + self.engine + self.cache + self.buckets

    @property
    def peak(self) -> float:
        """The most that is there at once."""
        return max(self.training, self.sampling, self.handing_over)

    @property
    def needed(self) -> float:
        """The same with an engine that has no cache yet: the cache takes what is left."""
        return max(self.training, self.peak - self.cache)

    @property
    def peak_phase(self) -> str:
        """When most is needed."""
        return "training" if self.training >= self.handing_over - self.cache else "handing over"


def policy_bytes(stage: Stage, layout: Layout, config: RunConfig) -> tuple[float, float, float, float]:
    """Weights, gradients, optimizer state on the GPU, optimizer state in host memory."""
    half = config.precision.params == "bf16"
    number = 2 if half else 4
    state = MOMENTS + (MASTER if half else 0)
    shares_dense = layout.dp * layout.cp if config.optimizer.distributed else 1
    experts = layout.world // (layout.ep * layout.expert_tp * layout.pp)
    shares_expert = experts if config.optimizer.distributed else 1
    optimizer = state * (stage.dense / shares_dense + stage.expert / shares_expert)
    host = optimizer if config.optimizer.offload else 0.0
    weights = number * stage.parameters
    if config.precision.fp8 != "none":
        weights += 2 * stage.parameters  # Transformer Engine keeps each in FP8 too, as it is and transposed
    return weights, GRADIENT * stage.parameters, optimizer - host, host


def in_flight(layout: Layout, stage: int, microbatches: int) -> float:
    """Micro-batches whose activations a stage keeps at once, in units of all of its layers (1F1B, interleaved 1F1B)."""
    if layout.pp == 1:
        return 1.0
    if layout.vpp == 1:
        return float(min(layout.pp - stage, microbatches))
    chunks = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(chunks, microbatches * layout.vpp) / layout.vpp


def rank_memory(
    number: int,
    shards: Shards,
    layout: Layout,
    config: RunConfig,
    packings: Mapping[str, Packing],
    microbatches: int,
    fleet: Fleet,
    gpu: Gpu,
    assumed: Assumptions,
) -> RankMemory:
    """Of a rank of stage `number`, with the micro-batch of `packings` that takes most."""
    stage = shards.stages[number]
    weights, gradients, optimizer, host = policy_bytes(stage, layout, config)
    taught = config.teacher.where == "resident" and bool(config.edges)
    ways = []
    for name, packing in packings.items():
        one = kept(
            shards.geometry,
            layout,
            packing,
            2 if config.precision.params == "bf16" else 4,
            config.precision.recompute,
            assumed.expert_imbalance,
        )
        ways.append((*_while_training(one, number, stage, layout, microbatches), name))
    activations, recomputed, logits, name = max(ways, key=lambda way: way[0] + max(way[1], way[2]))
    bare = RankMemory(
        stage=number,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        resident=weights if taught else 0.0,
        activations=activations,
        recomputed=recomputed,
        logits=logits,
        fragmentation=assumed.fragmentation * (activations + max(recomputed, logits)),
        runtime=assumed.runtime_bytes,
        buckets=2.0 * config.rollout.sglang.bucket_mib * 2**20,
        engine=0.0,
        engine_asleep=0.0,
        cache=0.0,
        host=host,
        packing=name,
    )
    return _with_engine(bare, shards, config, fleet, gpu, assumed)


def _while_training(
    one: Kept, number: int, stage: Stage, layout: Layout, microbatches: int
) -> tuple[float, float, float]:
    first, last = number == 0, number == layout.pp - 1
    each = stage.layers * one.layer + one.stage + one.held + (one.first if first else 0.0)
    activations = in_flight(layout, number, microbatches) * each + (one.head if last else 0.0)
    return activations, max(one.rebuilt, one.rebuilt_first if first else 0.0), one.logits if last else 0.0


def _with_engine(
    rank: RankMemory, shards: Shards, config: RunConfig, fleet: Fleet, gpu: Gpu, assumed: Assumptions
) -> RankMemory:
    """The rank with the server that shares its GPU, if one does."""
    if fleet.placement == "disaggregated":
        return rank
    engine = weight_bytes(shards, fleet)
    if fleet.embedded:
        modules = 1 + bool(config.edges) + config.log.kl_to_base
        return replace(rank, engine=modules * engine, engine_asleep=modules * engine)
    asleep = assumed.engine_asleep_bytes if config.rollout.sglang.sleep else engine
    cache = cache_share(config, fleet, engine, gpu, assumed, gpu.memory - rank.static - rank.buckets)
    return replace(
        rank, engine=engine, cache=cache, engine_asleep=asleep if config.rollout.sglang.sleep else engine + cache
    )


def cache_share(
    config: RunConfig, fleet: Fleet, weights: float, gpu: Gpu, assumed: Assumptions, left: float | None = None
) -> float:
    """Bytes for keys and values on a GPU. `left`: what a policy on the same GPU leaves to the engine."""
    given = config.rollout.sglang.args.get("mem-fraction-static", config.rollout.sglang.args.get("mem_fraction_static"))
    room = gpu.memory if left is None else left
    whole = float(given) * gpu.memory if given is not None else assumed.engine_share * room
    return max(0.0, whole - weights)
