"""The accuracy table: models × capabilities, with 95% intervals, and everything needed to read it rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from copd_megatron.evaluate.intervals import Estimate
from copd_megatron.evaluate.results import BenchmarkResult, CapabilityResult, ModelResult

METHOD = (
    "accuracy in % [95% interval]: Wilson's per capability, repeated problems and samples clustered; "
    "overall is the unweighted mean over capabilities with a normal interval"
)
METHOD_OF_SEVERAL = (
    "accuracy in % [95% interval]: Wilson's per benchmark, repeated problems and samples clustered; "
    "capabilities and overall are unweighted means over their benchmarks with a normal interval"
)


@dataclass(frozen=True)
class AccuracyTable:
    """Models compared on the same problems. `task` describes these, synthetic parts included; `samples` 1 is greedy.

    Raises ValueError if a model was tested on other benchmarks than the first.
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
        capabilities = self.models[0].capabilities if self.models else ()
        return ("model", *(result.name for result in capabilities), "overall", "length", "cut off")

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
            METHOD_OF_SEVERAL if self._several else METHOD,
            *self._faults(),
            *self.notes,
        ]

    def rich(self) -> RenderableType:
        """For the terminal of 80 columns: without lengths, which are in the other forms, and for more than two
        capabilities with intervals below the accuracies."""
        table = RichTable()
        shown = len(self.header) - 2
        for number, title in enumerate(self.header[:shown]):
            table.add_column(title, justify="right" if number else "left", no_wrap=True)
        for row in self.rows:
            table.add_row(*(cell.replace(" [", "\n[") if shown > 4 else cell for cell in row[:shown]))
        details = (self._by_model("benchmark", self._benchmark_rows()),) if self._several else ()
        return Group(table, *details, *(Text(note, style="dim") for note in self.footnotes))

    def markdown(self) -> str:
        """For a page of documentation."""
        lines = [_line(self.header), _line(["---", *["---:"] * (len(self.header) - 1)])]
        lines += [_line(row) for row in self.rows]
        if self._several:
            lines += ["", _line(["benchmark", *(model.name for model in self.models)])]
            lines += [_line(["---", *["---:"] * len(self.models)]), *map(_line, self._benchmark_rows())]
        return "\n".join([*lines, "", *(f"- {note}" for note in self.footnotes)]) + "\n"

    def breakdown(self) -> RenderableType | None:
        """Accuracy per kind of problem, a column per model, for the terminal; None if kinds were not told apart."""
        rows = [
            (f"{result.name} {kind}", *(_percent(model.benchmarks[column].groups[kind]) for model in self.models))
            for column, result in enumerate(self.models[0].benchmarks if self.models else ())
            for kind in result.groups
        ]
        return self._by_model("problems", rows) if rows else None

    def _benchmark_rows(self) -> list[tuple[str, ...]]:
        """Accuracy per benchmark, a column per model."""
        return [
            (result.name, *(_percent(model.benchmarks[column].estimate) for model in self.models))
            for column, result in enumerate(self.models[0].benchmarks)
        ]

    def _by_model(self, title: str, rows: Sequence[Sequence[str]]) -> RichTable:
        table = RichTable(title)
        for model in self.models:
            table.add_column(model.name, justify="right")
        for row in rows:
            table.add_row(*row)
        return table

    def json(self) -> dict[str, Any]:
        """For `evaluation.json` (observe/results.py), with more detail than the report draws."""
        return {
            "task": self.task,
            "n": max((result.problems for model in self.models for result in model.benchmarks), default=0),
            "samples": self.samples,
            "seed": self.seed,
            "notes": self.footnotes[1:],
            "models": [
                {
                    "name": model.name,
                    "capabilities": {result.name: _details(result) for result in model.capabilities},
                    "overall": _score(model.overall),
                }
                for model in self.models
            ],
        }

    def outcomes(self) -> dict[str, Any]:
        """For `outcomes.json`: what came of every problem, to compare models on the same ones (compare/statistics.py).

        {model: {capability, or capability/benchmark: [[sum of rewards, samples], …]}}
        """
        return {
            model.name: {result.name: [list(pair) for pair in result.outcomes] for result in model.benchmarks}
            for model in self.models
        }

    def _problems(self) -> str:
        counts = {
            f"{result.name} {result.problems:,}"
            + (f" ({result.distinct:,} different)" if result.distinct < result.problems else "")
            for model in self.models
            for result in model.benchmarks
        }
        return f"problems: {', '.join(sorted(counts))}"

    def _drawn(self) -> str:
        drawn = {result.name: result.samples for model in self.models for result in model.benchmarks}
        if self._several and len(set(drawn.values())) > 1:
            told = ", ".join(f"{name} {samples}" for name, samples in drawn.items() if samples > 1)
            return f"samples per problem (avg@n): {told}; the others greedy"
        samples = next(iter(drawn.values())) if self._several else self.samples
        return "greedy" if samples == 1 else f"avg@{samples}, {samples} samples per problem"

    def _faults(self) -> list[str]:
        """Samples that were not judged as usual and problems left out, where there are any."""
        notes = []
        for model in self.models:
            for result in model.benchmarks:
                odd = {status: count for status, count in result.verdicts.items() if status in ("timeout", "error")}
                notes += [f"{model.name}, {result.name}: {count} x {status}" for status, count in odd.items()]
                if result.refused:
                    notes.append(f"{model.name}, {result.name}: {result.refused} problems could not be used")
        return notes

    @property
    def _several(self) -> bool:
        """Whether any capability has several benchmarks."""
        return any(len(result.benchmarks) > 1 for model in self.models for result in model.capabilities)

    @staticmethod
    def _names(model: ModelResult) -> tuple[str, ...]:
        return tuple(result.name for result in model.benchmarks)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.accuracy:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _score(estimate: Estimate) -> dict[str, float]:
    return {"accuracy": estimate.accuracy, "low": estimate.low, "high": estimate.high, "trials": estimate.trials}


def _details(result: CapabilityResult) -> dict[str, Any]:
    if len(result.benchmarks) == 1:
        return _detail(result.benchmarks[0])
    return {
        **_score(result.estimate),
        "n": sum(benchmark.problems for benchmark in result.benchmarks),
        "truncated": result.truncated,
        "mean_length": result.mean_length,
        "benchmarks": {benchmark.name.rpartition("/")[2]: _detail(benchmark) for benchmark in result.benchmarks},
    }


def _detail(result: BenchmarkResult) -> dict[str, Any]:
    return {
        **_score(result.estimate),
        "n": result.problems,
        "distinct": result.distinct,
        "refused": result.refused,
        "samples": result.samples,
        "truncated": result.truncated,
        "mean_length": result.mean_length,
        "verdicts": dict(result.verdicts),
        "groups": {name: _score(estimate) for name, estimate in result.groups.items()},
    }
