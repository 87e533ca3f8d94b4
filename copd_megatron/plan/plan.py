"""A plan: what every branch of a run needs and how long its updates take, from the configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from copd_megatron.config.branches import BranchConfig
from copd_megatron.config.run import RunConfig
from copd_megatron.errors import ConfigError
from copd_megatron.plan import compute, engines, memory, traffic
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.engines import Fleet, Placement, Speed
from copd_megatron.plan.hardware import GPUS_PER_NODE, Gpu
from copd_megatron.plan.shards import ShardRequest, Shards, count, smallest
from copd_megatron.plan.timing import StepTime, step_time
from copd_megatron.plan.workload import Portion, Update, lengths_of, microbatches, packings, updates

CHECKPOINT_BYTES = {"bf16": 14, "fp32": 12}
"""Per parameter and branch (docs/checkpoints.md)."""


@dataclass(frozen=True)
class Phase:
    """One update of a phase: what is computed, what is sent, how long it takes."""

    update: Update
    training: compute.Training
    transfers: list[traffic.Transfer]
    time: StepTime


@dataclass(frozen=True)
class BranchPlan:
    """One branch. `cache`: bytes for keys and values on each of a server's GPUs, `engine` of weights and cache;
    `slots`: sequences with the longest of its prompts that a server decodes at once, 0 if not even one. `scored`
    are rollouts that students send to its engine in a Phase II step."""

    name: str
    gpus: int
    layout: str
    ranks: list[memory.RankMemory]
    fleet: Fleet
    engine: float
    cache: float
    slots: int
    speed: Speed
    scored: list[Portion]
    phases: dict[str, Phase]
    hand_over: traffic.Transfer
    score_answer_bytes: float
    score_request_bytes: float


@dataclass(frozen=True)
class Plan:
    """A run. `problems` are why it cannot run as it is; `binding` what comes nearest to a limit."""

    model: str
    shards: Shards
    every_shards: dict[ShardRequest, Shards]
    gpu: Gpu
    assumed: Assumptions
    branches: list[BranchPlan]
    gpus: int
    nodes: int
    given_nodes: int | None
    checkpoint_bytes: float
    checkpoint_stall: float
    checkpoint_seconds: float
    cycle_seconds: float
    run_seconds: float
    cut_share: float


def model_folder(config: RunConfig, file: Path) -> Path:
    """The folder whose config.json describes the base: the base's own, or `model/` beside the run description.

    ConfigError if neither is there.
    """
    places = [Path(config.base), file.parent / "model"]
    for folder in places:
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"{file}: base = {config.base}: no config.json in {' or '.join(map(str, places))}; planning needs one of the "
        "base model: put it there, it has a few kilobytes"
    )


def make_plans(
    configs: Sequence[tuple[RunConfig, Path]],
    gpus: Sequence[Gpu],
    assumed: Assumptions,
    placement: Placement | None = None,
    engine_gpus: int | None = None,
    nodes: int | None = None,
) -> list[Plan]:
    """Plans of several runs, each (configuration, folder of its model) on its GPU."""
    asked = {_request(config, branch, folder): None for config, folder in configs for branch in config.trained}
    found = dict(zip(asked, count(list(asked)), strict=True))
    return [
        _plan(config, folder, gpu, assumed, found, placement, engine_gpus, nodes)
        for (config, folder), gpu in zip(configs, gpus, strict=True)
    ]


def replan(plan: Plan, config: RunConfig) -> Plan:
    """The plan of the same run with more replicas and servers, whose ranks hold as many parameters."""
    place = plan.branches[0].fleet.placement
    return _plan(config, Path(plan.model), plan.gpu, plan.assumed, plan.every_shards, place, None, None)


def _request(config: RunConfig, branch: BranchConfig, folder: Path) -> ShardRequest:
    """What is counted for a branch: the same for all numbers of replicas."""
    return ShardRequest(str(folder), smallest(branch.parallel.layout()), config.precision.params)


def _plan(
    config: RunConfig,
    folder: Path,
    gpu: Gpu,
    assumed: Assumptions,
    found: dict[ShardRequest, Shards],
    placement: Placement | None,
    engine_gpus: int | None,
    nodes: int | None,
) -> Plan:
    branches = []
    every = {branch.name: updates(config, branch.name, assumed) for branch in config.trained}
    for branch in config.trained:
        layout = branch.parallel.layout()
        shards = found[_request(config, branch, folder)]
        scored = [
            update["exchange"].cross[branch.name]
            for update in every.values()
            if branch.name in update["exchange"].cross
        ]
        fleet = engines.fleet_of(config, layout.dp, placement, engine_gpus)
        branches.append(_branch(config, branch.name, shards, fleet, every[branch.name], scored, gpu, assumed))
    branches = [_waiting(branch, branches) for branch in branches]
    policy = sum(branch.gpus for branch in branches)
    own = sum(branch.fleet.total_gpus for branch in branches if branch.fleet.placement == "disaggregated")
    others = (
        [group for group in config.server_groups if group not in every] if config.rollout.engine == "sglang" else []
    )
    own += len(others) * branches[0].fleet.total_gpus
    total = policy + own
    size = CHECKPOINT_BYTES[config.precision.params] * shards.total
    used = -(-total // GPUS_PER_NODE)
    # Every rank copies its part; all branches write at once.
    stall = max(size / branch.gpus for branch in branches) / assumed.host_bandwidth
    write = len(branches) * size / min(assumed.file_system_bandwidth, used * assumed.disk_bandwidth)
    explore = max(branch.phases["explore"].time.total for branch in branches)
    exchange = max(branch.phases["exchange"].time.total for branch in branches)
    waits = 0.0 if config.checkpoint.asynchronous else write
    cycle = config.rhythm.explore_steps * explore + config.rhythm.exchange_steps * exchange + 2 * (stall + waits)
    return Plan(
        model=str(folder),
        shards=shards,
        every_shards=found,
        gpu=gpu,
        assumed=assumed,
        branches=branches,
        gpus=total,
        nodes=used,
        given_nodes=nodes,
        checkpoint_bytes=size,
        checkpoint_stall=stall,
        checkpoint_seconds=write,
        cycle_seconds=cycle,
        run_seconds=config.rhythm.cycles * cycle,
        cut_share=lengths_of(config, assumed).cut_share,
    )


def _branch(
    config: RunConfig,
    name: str,
    shards: Shards,
    fleet: Fleet,
    steps: dict[str, Update],
    scored: list[Portion],
    gpu: Gpu,
    assumed: Assumptions,
) -> BranchPlan:
    layout = config.branch(name).parallel.layout()
    batches = {phase: microbatches(update, config, layout.dp) for phase, update in steps.items()}
    shapes = {
        f"{shape} of {portion.capability.name}": packing
        for portion in (steps["exchange"].portions or steps["explore"].portions)
        for shape, packing in packings(portion.capability, config, assumed).items()
    }
    ranks = [
        memory.rank_memory(stage, shards, layout, config, shapes, max(batches.values()), fleet, gpu, assumed)
        for stage in range(layout.pp)
    ]
    weights = engines.weight_bytes(shards, fleet)
    if fleet.placement == "disaggregated":
        cache = memory.cache_share(config, fleet, weights, gpu, assumed)
    else:
        cache = min(rank.cache for rank in ranks)
    speed = Speed(shards.geometry, shards, fleet, gpu, assumed, cache)
    portions = steps["exchange"].portions or steps["explore"].portions
    context = max(portion.capability.prompt / portion.group + portion.lengths.average for portion in portions)
    hand_over = traffic.hand_over(shards, config, fleet.servers, gpu, assumed)
    phases = {}
    for phase, update in steps.items():
        trained = compute.training(shards, layout, config, update, batches[phase], gpu, assumed)
        transfers = traffic.collectives(shards, layout, config, update, gpu, assumed)
        asked = scored if phase == "exchange" else []
        time = step_time(update, asked, speed, fleet.servers, trained, transfers, hand_over)
        phases[phase] = Phase(update, trained, transfers, time)
    tower = shards.geometry.tower
    answers, requests = traffic.scoring_bytes(steps["exchange"], config, tower.patch_features if tower else 0, assumed)
    return BranchPlan(
        name=name,
        gpus=layout.world,
        layout=_layout_text(layout),
        ranks=ranks,
        fleet=fleet,
        engine=weights + cache,
        cache=cache,
        slots=engines.engine_slots(shards, fleet, cache, context),
        speed=speed,
        scored=scored,
        phases=phases,
        hand_over=hand_over,
        score_answer_bytes=answers,
        score_request_bytes=requests,
    )


def _waiting(branch: BranchPlan, branches: Sequence[BranchPlan]) -> BranchPlan:
    """The branch with what it waits for slower ones: in every step of Phase II, and on average in Phase I, whose steps
    follow each other without a barrier."""
    phases = {
        name: replace(
            phase,
            time=replace(phase.time, wait=max(other.phases[name].time.busy for other in branches) - phase.time.busy),
        )
        for name, phase in branch.phases.items()
    }
    return replace(branch, phases=phases)


def _layout_text(layout: object) -> str:
    names = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")
    degrees = [f"{name} {getattr(layout, name)}" for name in names if getattr(layout, name) > 1]
    return ", ".join([*degrees, *(["sp"] if getattr(layout, "sequence_parallel", False) else [])]) or "one process"
