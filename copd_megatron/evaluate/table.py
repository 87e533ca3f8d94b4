"""The accuracy table: models × capabilities, with 95% intervals, and everything needed to read it rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from copd_megatron.evaluate.benchmark import CapabilityResult
from copd_megatron.evaluate.intervals import Estimate
from copd_megatron.evaluate.model import ModelResult

METHOD = (
    "accuracy in % [95% interval]: Wilson's per capability, repeated problems and samples clustered; "
    "overall is the unweighted mean over capabilities with a normal interval"
)


@dataclass(frozen=True)
class AccuracyTable:
    """Models compared on the same problems. `task` describes these, synthetic parts included; `samples` 1 is greedy.

    Raises ValueError if a model was tested on other capabilities than the first.
    """

    task: str
    models: tuple[ModelResult, ...]
    samples: int
    seed: int
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for model in self.models:
            if self._names(model) != self._names(self.models[0]):
                raise ValueError(
                    f"{model.name} was tested on {self._names(model)}, "
                    f"{self.models[0].name} on {self._names(self.models[0])}"
                )

    @property
    def header(self) -> tuple[str, ...]:
        """Column titles."""
        capabilities = self._names(self.models[0]) if self.models else ()
        return ("model", *capabilities, "overall", "length", "cut off")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """Cells as text, a row per model."""
        return [
            (
                model.name,
                *(_percent(result.estimate) for result in model.capabilities),
                _percent(model.overall),
                "/".join(f"{result.mean_length:.1f}" for result in model.capabilities),
                "/".join(f"{result.truncated:.1%}" for result in model.capabilities),
            )
            for model in self.models
        ]

    @property
    def footnotes(self) -> list[str]:
        """What the numbers are, in the order to be printed under the table."""
        return [
            self.task,
            f"{self._problems()}; {self._drawn()}; seed {self.seed}",
            METHOD,
            *self._faults(),
            *self.notes,
        ]

    def rich(self) -> RenderableType:
        """For the terminal; lengths, which would not fit 80 columns, are in the other forms."""
        table = RichTable()
        shown = len(self.header) - 2
        for number, title in enumerate(self.header[:shown]):
            table.add_column(title, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*row[:shown])
        return Group(table, *(Text(note, style="dim") for note in self.footnotes))

    def markdown(self) -> str:
        """For a page of documentation."""
        lines = [_line(self.header), _line(["---", *["---:"] * (len(self.header) - 1)])]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.footnotes)]) + "\n"

    def breakdown(self) -> RenderableType | None:
        """Accuracy per kind of problem, a column per model, for the terminal; None if kinds were not told apart."""
        kinds = [
            (column, result.capability, kind)
            for column, result in enumerate(self.models[0].capabilities if self.models else ())
            for kind in result.groups
        ]
        if not kinds:
            return None
        table = RichTable("problems")
        for model in self.models:
            table.add_column(model.name, justify="right")
        for column, capability, kind in kinds:
            table.add_row(
                f"{capability} {kind}", *(_percent(model.capabilities[column].groups[kind]) for model in self.models)
            )
        return table

    def json(self) -> dict[str, Any]:
        """For `evaluation.json` (observe/results.py), with more detail than the report draws."""
        return {
            "task": self.task,
            "n": max((result.problems for model in self.models for result in model.capabilities), default=0),
            "samples": self.samples,
            "seed": self.seed,
            "notes": self.footnotes[1:],
            "models": [
                {
                    "name": model.name,
                    "capabilities": {result.capability: _detail(result) for result in model.capabilities},
                    "overall": _score(model.overall),
                }
                for model in self.models
            ],
        }

    def outcomes(self) -> dict[str, Any]:
        """For `outcomes.json`: what came of every problem, to compare models on the same ones (compare/statistics.py).

        {model: {capability: [[sum of rewards, samples], …]}}
        """
        return {
            model.name: {result.capability: [list(pair) for pair in result.outcomes] for result in model.capabilities}
            for model in self.models
        }

    def _problems(self) -> str:
        counts = {
            f"{result.capability} {result.problems:,}"
            + (f" ({result.distinct:,} different)" if result.distinct < result.problems else "")
            for model in self.models
            for result in model.capabilities
        }
        return f"problems: {', '.join(sorted(counts))}"

    def _drawn(self) -> str:
        return "greedy" if self.samples == 1 else f"avg@{self.samples}, {self.samples} samples per problem"

    def _faults(self) -> list[str]:
        """Samples that were not judged as usual and problems left out, where there are any."""
        notes = []
        for model in self.models:
            for result in model.capabilities:
                odd = {status: count for status, count in result.verdicts.items() if status in ("timeout", "error")}
                notes += [f"{model.name}, {result.capability}: {count} x {status}" for status, count in odd.items()]
                if result.refused:
                    notes.append(f"{model.name}, {result.capability}: {result.refused} problems could not be used")
        return notes

    @staticmethod
    def _names(model: ModelResult) -> tuple[str, ...]:
        return tuple(result.capability for result in model.capabilities)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.accuracy:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(estimate: Estimate) -> dict[str, float]:
    return {"accuracy": estimate.accuracy, "low": estimate.low, "high": estimate.high, "trials": estimate.trials}


def _detail(result: CapabilityResult) -> dict[str, Any]:
    return {
        **_score(result.estimate),
        "n": result.problems,
        "distinct": result.distinct,
        "refused": result.refused,
        "truncated": result.truncated,
        "mean_length": result.mean_length,
        "verdicts": dict(result.verdicts),
        "groups": {name: _score(estimate) for name, estimate in result.groups.items()},
    }
