"""`copd plan --scale`: cycles simulated on more and more GPUs, and where adding them stops paying."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from copd_megatron.config.run import RunConfig
from copd_megatron.errors import ConfigError
from copd_megatron.files import write_atomic
from copd_megatron.plan.events import Activities, NeverEnds, Outcome, Rules, simulate
from copd_megatron.plan.plan import Plan, replan
from copd_megatron.plan.shards import smallest
from copd_megatron.plan.stragglers import Servers

log = logging.getLogger(__name__)

Work = Literal["grows", "fixed"]
"""`grows`: prompts in proportion to GPUs; `fixed`: those of the configuration."""

CYCLES = 12
"""Cycles of a simulated run: enough for failures to be more than chance."""


@dataclass(frozen=True)
class Point:
    """A simulated run on `gpus` GPUs: response tokens per second that lasted, shares of GPU time, failures."""

    gpus: int
    work: Work
    prompts: int
    tokens_per_second: float
    shares: dict[str, float]
    failures: int
    hours: float

    @property
    def undone(self) -> float:
        """Share of GPU time that checkpoints, failures and restarts take."""
        return sum(self.shares[name] for name in ("checkpoint", "lost", "restart"))

    @property
    def per_gpu(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens_per_second / self.gpus


@dataclass(frozen=True)
class Knee:
    """The last scale that is worth its GPUs, and the activity whose share has grown most by the next one."""

    gpus: int | None
    because: str


def scaling(plan: Plan, config: RunConfig, wanted: str, seed: int, console: Console, out: Path | None) -> None:
    """Simulate, print the table, write JSON and plot."""
    least, most = _bounds(wanted)
    points = sweep(plan, config, least, most, seed)
    if not points:
        raise ConfigError(
            f"--scale {wanted}: no layout of these branches has so many GPUs; the smallest has "
            f"{min(gpus for gpus, _ in _sizes(plan, config, 1, 2**40))}"
        )
    knees = {work: knee([point for point in points if point.work == work], plan.assumed.knee_share) for work in WORKS}
    _print(points, knees, console)
    if out is not None:
        data = {
            "model": Path(plan.model).parent.name or plan.model,
            "gpu": plan.gpu.name,
            "seed": seed,
            "cycles": CYCLES,
            "assumptions": plan.assumed.model_dump(),
            "points": [asdict(point) | {"per_gpu": point.per_gpu} for point in points],
            "knees": {work: asdict(found) for work, found in knees.items()},
        }
        write_atomic(out, json.dumps(data, indent=1) + "\n")
        from copd_megatron.plan.scale_plot import scale_plot

        write_atomic(out.with_suffix(".png"), scale_plot(points, knees, Path(plan.model).parent.name or plan.model))


WORKS: tuple[Work, ...] = ("grows", "fixed")


def sweep(plan: Plan, config: RunConfig, least: int, most: int, seed: int, cycles: int = CYCLES) -> list[Point]:
    """Simulated runs of `cycles` cycles on the configuration's layouts with 2ⁿ times as many replicas and servers,
    between `least` and `most` GPUs."""
    points = []
    servers = Servers(seed)
    for work in WORKS:
        for gpus, factor in _sizes(plan, config, least, most):
            larger = _scaled(config, factor, work)
            if larger is None:
                continue
            try:
                points.append(_point(replan(plan, larger), larger, gpus, work, seed, servers, cycles))
            except NeverEnds as error:
                log.warning("%d GPUs are not simulated, nor more of them: %s", gpus, error)
                break
    return points


def knee(points: Sequence[Point], share: float) -> Knee:
    """Where throughput per GPU is last at least `share` of the best; points ascend."""
    if not points:
        return Knee(None, "no scale was simulated")
    best = max(points, key=lambda point: point.per_gpu)
    after = [point for point in points if point.gpus > best.gpus and point.per_gpu < share * best.per_gpu]
    if not after:
        return Knee(None, f"throughput per GPU stays above {share:.0%} of the best up to {points[-1].gpus:,} GPUs")
    first = after[0]
    last = [point for point in points if point.gpus < first.gpus][-1]
    growth = {name: value - best.shares.get(name, 0.0) for name, value in first.shares.items()}
    name = max(growth, key=lambda item: growth[item])
    return Knee(
        last.gpus,
        f"{name.replace('_', '-')}: {best.shares.get(name, 0.0):.0%} of the GPUs' time at {best.gpus:,} GPUs, "
        f"{first.shares[name]:.0%} at {first.gpus:,}",
    )


def _bounds(wanted: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)\.\.(\d+)", wanted)
    if match is None or not 0 < int(match[1]) <= int(match[2]):
        raise ConfigError(f"--scale {wanted}: expected FROM..TO, for example 8..16384")
    return int(match[1]), int(match[2])


def _sizes(plan: Plan, config: RunConfig, least: int, most: int) -> list[tuple[int, float]]:
    """(GPUs, factor) of the layouts that there are."""
    factor = 1.0
    branches = config.trained
    while all(
        branch.parallel.world * factor / 2 >= smallest(branch.parallel.layout()).world
        and (branch.parallel.world * factor / 2) % smallest(branch.parallel.layout()).world == 0
        and (part.fleet.servers * factor / 2) % 1 == 0
        for branch, part in zip(branches, plan.branches, strict=True)
    ):
        factor /= 2
    sizes = []
    while (gpus := round(plan.gpus * factor)) <= most:
        sizes += [(gpus, factor)] if gpus >= least else []
        factor *= 2
    return sizes


def _scaled(config: RunConfig, factor: float, work: Work) -> RunConfig | None:
    """The configuration with `factor` times as many replicas and servers; None where replicas would have no prompts."""
    plain: dict[str, Any] = config.model_dump()
    for branch in plain["branches"]:
        branch["parallel"]["world"] = round(branch["parallel"]["world"] * factor)
    servers = plain["rollout"]["sglang"]["servers"] * factor
    plain["rollout"]["sglang"]["servers"] = max(1, round(servers))
    if work == "grows":
        for section, name, number in (
            ("rl", "prompts", config.rl.prompts),
            ("opd", "native_prompts", config.native_prompts),
            ("opd", "cross_prompts", config.cross_prompts),
        ):
            plain[section][name] = round(number * factor)
    replicas = [branch.parallel.layout().dp * factor for branch in config.trained]
    cross = plain["opd"]["cross_prompts"] or plain["rl"]["prompts"]
    if any(number % dp for dp in replicas for number in (plain["rl"]["prompts"], cross)):
        return None
    most = max(len(config.lessons(branch.name)) for branch in config.trained)
    if any(cross < dp * most for dp in replicas):
        return None
    return RunConfig.model_validate(plain)


def _point(plan: Plan, config: RunConfig, gpus: int, work: Work, seed: int, servers: Servers, cycles: int) -> Point:
    outcome = simulate(_rules(plan, config, cycles), _draw(plan, servers), seed)
    tokens = sum(
        number * portion.response_tokens
        for branch in plan.branches
        for phase, number in (
            ("explore", config.rhythm.explore_steps * cycles),
            ("exchange", config.rhythm.exchange_steps * cycles),
        )
        for portion in branch.phases[phase].update.portions
    )
    return Point(
        gpus=gpus,
        work=work,
        prompts=config.rl.prompts,
        tokens_per_second=tokens / outcome.seconds,
        shares=_shares(outcome),
        failures=outcome.failures,
        hours=outcome.seconds / 3600,
    )


def _shares(outcome: Outcome) -> dict[str, float]:
    return dict(sorted(outcome.shares.items(), key=lambda pair: -pair[1]))


def _rules(plan: Plan, config: RunConfig, cycles: int) -> Rules:
    names = [branch.name for branch in plan.branches]
    peers: dict[str, set[str]] = {name: set() for name in names}
    for student, teacher in config.edges:
        peers[student].add(teacher)
        peers[teacher].add(student)
    own = {
        branch.name: branch.gpus + (branch.fleet.total_gpus if branch.fleet.placement == "disaggregated" else 0)
        for branch in plan.branches
    }
    return Rules(
        gpus=own,
        peers={name: tuple(sorted(others)) for name, others in peers.items()},
        cycles=cycles,
        explore_steps=config.rhythm.explore_steps,
        exchange_steps=config.rhythm.exchange_steps,
        checkpoint_every=config.checkpoint.every_steps,
        stall=plan.checkpoint_stall + (0.0 if config.checkpoint.asynchronous else plan.checkpoint_seconds),
        write=plan.checkpoint_seconds if config.checkpoint.asynchronous else 0.0,
        mtbf=plan.assumed.mtbf_gpu_hours * 3600,
        restart=plan.assumed.restart_seconds,
    )


def _draw(plan: Plan, servers: Servers) -> Any:
    branches = {branch.name: branch for branch in plan.branches}

    def draw(name: str, exchange: bool, random: np.random.Generator) -> Activities:
        branch = branches[name]
        phase = branch.phases["exchange" if exchange else "explore"]
        average, beyond = servers.rollout_seconds(branch, phase.update.portions, random)
        time = phase.time
        return {
            "rollout": average,
            "stragglers": beyond,
            "score": time.score,
            "train": time.train,
            "communicate": time.communicate,
            "hand_over": time.hand_over,
        }

    return draw


def _print(points: Sequence[Point], knees: dict[Work, Knee], console: Console) -> None:
    names = ("rollout", "stragglers", "score", "train", "communicate", "hand_over", "wait")
    for work in WORKS:
        title = {"grows": "Prompts grow with GPUs", "fixed": "The configuration's prompts"}[work]
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for column in (
            "GPUs",
            "prompts",
            "tokens/s",
            "per GPU",
            *(name.replace("_", "-") for name in names),
            "undone",
            "failures",
        ):
            table.add_column(column, justify="right")
        for point in points:
            if point.work == work:
                table.add_row(
                    f"{point.gpus:,}",
                    f"{point.prompts:,}",
                    f"{point.tokens_per_second:,.0f}",
                    f"{point.per_gpu:,.1f}",
                    *(f"{point.shares.get(name, 0.0):.1%}" for name in names),
                    f"{point.undone:.1%}",
                    str(point.failures),
                )
        console.print(table)
        found = knees[work]
        where = "No knee" if found.gpus is None else f"Knee at {found.gpus:,} GPUs"
        console.print(f"{where}: {found.because}.", soft_wrap=True)
    console.print("Simulated, not measured on GPUs.")
