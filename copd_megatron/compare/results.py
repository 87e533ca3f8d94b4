"""What the runs of a comparison came to: accuracies, differences and budgets of every row, as in `compare.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from copd_megatron.budget import Chain, Cost, Summary, read_summary
from copd_megatron.compare.child_run import is_done
from copd_megatron.compare.settings import Arm, Comparison, Row
from copd_megatron.compare.statistics import Accuracy, Outcomes, accuracies
from copd_megatron.errors import CopdError
from copd_megatron.run_folder import RunFolder

BUDGET = ("updates", "rollout_tokens")
"""What has to be equal."""


@dataclass(frozen=True)
class RowResult:
    """A row. `cost` is the mean over seeds of what it took to get the model, experts included; None for the base.

    `missing` says why a seed has no result. `budget` says how the cost differs from the first reference's, where it
    must not.
    """

    label: str
    arm: str
    ratio: float | None
    accuracy: Accuracy | None
    cost: Mapping[str, float] | None
    missing: Mapping[int, str]
    budget: str | None

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def gather(comparison: Comparison, reasons: Mapping[tuple[str, int], str]) -> list[RowResult]:
    """Every row, in the comparison's order; rows without a result say why.

    Raises CopdError for a run whose results are damaged or lack the row's model.
    """
    rows = [(arm, row) for arm in comparison.arms for row in arm.rows]
    outcomes: dict[str, dict[int, Outcomes]] = {row.label: {} for _, row in rows}
    costs: dict[str, list[dict[str, float]]] = {row.label: [] for _, row in rows}
    for seed in comparison.seeds:
        for arm in comparison.arms:
            run = comparison.run_dir(arm.name, seed)
            if not is_done(run):
                continue
            found, summary = read_outcomes(run), read_summary(run)
            for row in arm.rows:
                if row.model not in found:
                    raise CopdError(f"{run}: {row.label!r} is to be {row.model!r}, but it has {', '.join(found)}")
                outcomes[row.label][seed] = found[row.model]
                if summary is not None and row.model != "base":
                    costs[row.label].append(cost_of(summary, row.model))
    numbers = accuracies(outcomes, comparison.reference, comparison.replicates)
    means = {label: _mean(found) for label, found in costs.items() if found}
    return [
        RowResult(
            label=row.label,
            arm=arm.name,
            ratio=row.ratio,
            accuracy=numbers.get(row.label),
            cost=means.get(row.label),
            missing={
                seed: reasons.get((arm.name, seed), "not begun")
                for seed in comparison.seeds
                if seed not in outcomes[row.label]
            },
            budget=_over_budget(comparison, arm, row, means),
        )
        for arm, row in rows
    ]


def cost_of(summary: Summary, model: str) -> dict[str, float]:
    """What it took to get a run's `model`: of a branch that nobody taught its own cost, else that of the whole run."""
    branch = model.removesuffix(" branch")
    alone = summary.method in ("merge_only", "expert") and branch in summary.branches
    own = summary.branches[branch] if alone else None
    total = Chain(**own.model_dump(), depth=own.updates, parallel_seconds=own.seconds) if own else summary.total
    return {name: float(getattr(total, name)) for name in (*Cost.model_fields, "depth", "parallel_seconds")}


def read_outcomes(run: Path) -> dict[str, Outcomes]:
    """What came of every problem, by model. Raises CopdError for a damaged file."""
    file = RunFolder(run).outcomes
    try:
        content: dict[str, Outcomes] = json.loads(file.read_text())
    except ValueError as error:
        raise CopdError(
            f"{file}: {error}. Remove it and {RunFolder(run).evaluation.name}, and compare again"
        ) from error
    return content


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(cost[name] for cost in found) for name in found[0]}


def _over_budget(comparison: Comparison, arm: Arm, row: Row, means: Mapping[str, Mapping[str, float]]) -> str | None:
    reference, own = means.get(comparison.reference[0]), means.get(row.label)
    if not row.equal_budget or reference is None or own is None:
        return None
    parts = [
        f"{name.replace('_', ' ')} {own[name] / reference[name] - 1:+.1%}"
        for name in BUDGET
        if abs(own[name] - reference[name]) > comparison.tolerance * reference[name]
    ]
    return f"{row.label} ({arm.name}): {', '.join(parts)}" if parts else None
