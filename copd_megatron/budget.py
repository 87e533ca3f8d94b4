"""What a run has cost, and what the models cost that it started from: `summary.json`, for comparisons at equal budget.

    {"method": str, "seed": int,
     "branches": {name: COST}, "inherited": [{"run": str, "branch": str, "depth": int, "parallel_seconds": s, **COST}],
     "total": {**COST, "depth": int, "parallel_seconds": s}, "unknown": [folder]}
    COST: {"updates", "explore_updates", "exchange_updates", "rollouts", "rollout_tokens", "seconds"}

`rollout_tokens` are those sampled for training, `seconds` those of training steps and of probes and checkpoints between
them. `depth` is the number of updates that have to be made one after the other, `parallel_seconds` the same in time:
branches train at once, and a run begins when the experts it starts from are finished. `unknown` lists experts whose run
is not there; then the totals are those of what is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError
from copd_megatron.files import write_atomic
from copd_megatron.observe.jsonl import Line
from copd_megatron.observe.metrics import read_metrics
from copd_megatron.run_folder import RunFolder


class Cost(BaseModel):
    """What one branch, or several together, have used."""

    model_config = ConfigDict(frozen=True)
    updates: int
    explore_updates: int
    exchange_updates: int
    rollouts: int
    rollout_tokens: int
    seconds: float

    @staticmethod
    def total(costs: Sequence[Cost]) -> dict[str, Any]:
        """The sum of each field."""
        return {name: sum(getattr(cost, name) for cost in costs) for name in Cost.model_fields}


class Chain(Cost):
    """The same with what has to happen in sequence."""

    depth: int
    parallel_seconds: float


class Inherited(Chain):
    """An expert that a run was given: branch `branch` of `run`."""

    run: str
    branch: str


class Summary(BaseModel):
    """The file."""

    model_config = ConfigDict(frozen=True)
    method: str
    seed: int
    branches: dict[str, Cost]
    inherited: tuple[Inherited, ...]
    total: Chain
    unknown: tuple[str, ...]


def write_summary(config: RunConfig, folder: RunFolder) -> Summary:
    """Add up the run's metrics and write the file."""
    names = [branch.name for branch in config.trained]
    lines = read_metrics(folder.path)
    branches = {name: cost_of(line for line in lines if line["branch"] == name) for name in names}
    inherited, unknown = _inherited(config)
    depth = max(cost.updates for cost in branches.values())
    seconds = max(cost.seconds for cost in branches.values())
    summary = Summary(
        method=config.method,
        seed=config.seed,
        branches=branches,
        inherited=tuple(inherited),
        total=Chain(
            **Cost.total([*branches.values(), *inherited]),
            depth=depth + max((one.depth for one in inherited), default=0),
            parallel_seconds=seconds + max((one.parallel_seconds for one in inherited), default=0.0),
        ),
        unknown=tuple(unknown),
    )
    write_atomic(folder.summary, json.dumps(summary.model_dump(mode="json"), indent=1) + "\n")
    return summary


def read_summary(run: Path) -> Summary | None:
    """A run's summary; None where it has none. Raises CopdError if it is damaged."""
    try:
        return Summary.model_validate_json(RunFolder(run).summary.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise CopdError(f"{RunFolder(run).summary}: {error}. Remove it and start the run's command again") from error


def cost_of(lines: Iterable[Line]) -> Cost:
    """What the updates in a branch's metrics add up to."""
    phases = {"explore": 0, "exchange": 0}
    rollouts = tokens = 0
    seconds = []
    for line in lines:
        if line["phase"] not in phases:
            continue
        phases[line["phase"]] += 1
        rollouts += line.get("count/rollouts") or 0
        tokens += line.get("count/rollout_tokens") or 0
        seconds += [line.get("time/step") or 0.0, line.get("time/between") or 0.0]
    return Cost(
        updates=sum(phases.values()),
        explore_updates=phases["explore"],
        exchange_updates=phases["exchange"],
        rollouts=rollouts,
        rollout_tokens=tokens,
        seconds=math.fsum(seconds),
    )


def _inherited(config: RunConfig) -> tuple[list[Inherited], list[str]]:
    """Every branch that has led to the experts in use, once, and the folders of those that are not known."""
    used = sorted(
        set(config.frozen) | ({config.student} if config.method == "static_opd" and config.student else set())
    )
    found: dict[tuple[str, str], Inherited] = {}
    unknown = []
    for name in used:
        final = Path(config.experts[name]).absolute()
        run, branch = final.parents[2], final.parent.name
        summary = read_summary(run)
        if summary is None or branch not in summary.branches or final != RunFolder(run).final(branch).absolute():
            unknown.append(str(final))
            continue
        cost = summary.branches[branch]
        for earlier in summary.inherited:
            found.setdefault((earlier.run, earlier.branch), earlier)
        found[str(run), branch] = Inherited(
            **cost.model_dump(),
            run=str(run),
            branch=branch,
            depth=cost.updates + max((one.depth for one in summary.inherited), default=0),
            parallel_seconds=cost.seconds + max((one.parallel_seconds for one in summary.inherited), default=0.0),
        )
        unknown += summary.unknown
    return list(found.values()), unknown
