"""The report's tables, as rows of text. A cell without a number shows a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from copd_megatron.observe.progress import duration
from copd_megatron.observe.record import PROBE, SWITCH, RunRecord
from copd_megatron.observe.results import ModelResult, Score

ABSENT = "–"
COUNTERS = {
    "count/rollouts": "rollouts",
    "count/rollout_tokens": "tokens of rollouts",
    "count/groups": "groups of rollouts",
    "count/zero_variance": "groups without reward variance (no gradient)",
    "count/unparsable": "answers that could not be parsed",
    "count/truncated": "responses cut at the length limit",
    "count/skipped": "updates skipped (loss or gradient not finite)",
    "count/refused": "prompts refused (too long)",
}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column is a name, the others are numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def summary_table(records: Sequence[RunRecord], names: Sequence[str]) -> Table | None:
    """One row per branch: how far, how good, how fast. `names` of the runs are shown where there are several."""
    rows = []
    for name, record, branch in [(n, r, b) for n, r in zip(names, records, strict=True) for b in r.branches]:
        rewards = record.series(branch, "reward/mean").finite
        tenth = max(1, len(rewards) // 10)
        memory = record.series(branch, "memory_gib") or record.series(branch, "rss_gib")
        seconds = record.series(branch, "time/step").finite
        rows.append(
            (
                branch if len(records) == 1 else f"{name}: {branch}",
                str(record.steps_done(branch)),
                number(mean(rewards[:tenth])),
                number(mean(rewards[-tenth:])),
                number(mean(record.series(branch, "tokens_per_second").finite), 0),
                number(max(memory.finite, default=None), 2),
                duration(sum(seconds)) if seconds else ABSENT,
            )
        )
    header = (
        "branch",
        "updates",
        "reward, first tenth",
        "reward, last tenth",
        "tokens/s",
        "peak memory, GiB",
        "time in steps",
    )
    return Table(header, tuple(rows)) if rows else None


def drift_table(record: RunRecord) -> Table | None:
    """Overlap and symmetric KL of every edge at the end of both phases of every cycle, where they were measured."""
    ends: dict[int, dict[str, int]] = {}
    for period in record.finished_periods():
        ends.setdefault(period.cycle, {})[period.phase] = period.end
    rows = []
    for student, teacher in dict.fromkeys([*record.edges("overlap"), *record.edges("symkl")]):
        measured = {
            metric: dict(zip(series.steps, series.values, strict=True))
            for metric in ("overlap", "symkl")
            for series in [record.series(student, f"{metric}/{teacher}", PROBE)]
        }
        for cycle, steps in ends.items():
            cells = [
                number(measured[metric].get(steps.get(phase, -1)))
                for metric in ("overlap", "symkl")
                for phase in ("explore", "exchange")
            ]
            if set(cells) != {ABSENT}:
                rows.append((f"{student} ← {teacher}", str(cycle + 1), *cells))
    header = (
        "student ← teacher",
        "cycle",
        "overlap after Phase I",
        "after Phase II",
        "symmetric KL after Phase I",
        "after Phase II",
    )
    return Table(header, tuple(rows)) if rows else None


def switch_table(record: RunRecord) -> Table | None:
    """Every end of a steered phase and its reason; all branches switch together, so one of them tells."""
    branch = record.branches[0] if record.branches else None
    rows = [
        (
            "Phase I" if line["ended"] == "explore" else "Phase II",
            str(line["cycle"] + 1),
            str(line["step"]),
            f"{line['length']:.0f}",
            f"{number(line['low'])} to {number(line['high'])}",
            number(line.get("gain"), 4),
            line["reason"],
        )
        for line in record.lines
        if line["phase"] == SWITCH and line["branch"] == branch
    ]
    header = ("phase", "cycle", "ended after update", "its updates", "bounds", "gain per update", "reason")
    return Table(header, tuple(rows)) if rows else None


def counter_table(record: RunRecord) -> Table | None:
    """Events of the whole run, summed over its steps; what was never counted shows a dash, not a zero."""
    keys = dict.fromkeys([*COUNTERS, *(key for line in record.lines for key in line if key.startswith("count/"))])
    rows = []
    for key in keys:
        found = [record.series(branch, key).finite for branch in record.branches]
        totals = tuple(f"{sum(values):,.0f}" if values else ABSENT for values in found)
        rows.append((COUNTERS.get(key, key.removeprefix("count/").replace("_", " ")), *totals))
    if all(cell == ABSENT for row in rows for cell in row[1:]):
        return None
    return Table(("event", *record.branches), tuple(rows))


def failure_table(record: RunRecord, shown: int = 200) -> Table | None:
    """What failed and what was done about it, in order; of very many only the last."""
    told = [event for event in record.events if event["kind"] in ("warning", "failure", "recovery", "stop")]
    rows = tuple(
        (event["time"][:19].replace("T", " "), event["source"], event["kind"], event["text"].split("\n")[0])
        for event in told[-shown:]
    )
    return Table(("time (UTC)", "where", "what", "text"), rows) if rows else None


def accuracy_table(models: Sequence[ModelResult]) -> Table | None:
    """Accuracy and 95% interval, in percent, of every model."""
    capabilities = dict.fromkeys(name for model in models for name in model.capabilities)
    rows = tuple(
        (model.name, *(_score(model.capabilities.get(name)) for name in capabilities), _score(model.overall))
        for model in models
    )
    return Table(("model", *capabilities, "overall"), rows) if rows else None


def benchmark_table(models: Sequence[ModelResult]) -> Table | None:
    """Accuracy and 95% interval by benchmark, a column per model; None where no capability has several."""
    found = [
        {
            f"{capability}/{name}": score
            for capability, whole in model.capabilities.items()
            for name, score in whole.benchmarks.items()
        }
        for model in models
    ]
    names = dict.fromkeys(name for scores in found for name in scores)
    rows = tuple((name, *(_score(scores.get(name)) for scores in found)) for name in names)
    return Table(("benchmark", *(model.name for model in models)), rows) if rows else None


def number(value: float | None, digits: int = 3) -> str:
    """A number with fixed digits, or a dash."""
    return ABSENT if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def mean(values: Sequence[float]) -> float | None:
    """Mean; None of nothing."""
    return sum(values) / len(values) if values else None


def _score(score: Score | None) -> str:
    if score is None:
        return ABSENT
    return f"{100 * score.accuracy:.1f} [{100 * score.low:.1f}, {100 * score.high:.1f}]"
