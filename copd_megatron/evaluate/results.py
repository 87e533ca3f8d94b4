"""What models have come to: by benchmark, by capability, overall."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean

from copd_megatron.evaluate.intervals import Estimate, mean_of


@dataclass(frozen=True)
class BenchmarkResult:
    """What a model can do of one set of problems, called as its capability or `<capability>/<benchmark>`.

    `estimate` is the accuracy (avg@n with `samples` n per problem) with its interval. `distinct` of the `problems` are
    different ones; the interval counts repetitions as samples of one problem. `groups` are the accuracies of the kinds
    of problems, if they were told apart. `truncated` is the share of samples cut at the length limit, `mean_length`
    counts tokens. `verdicts` counts samples by what judging came to; `refused` counts problems that could not be made
    into prompts and are left out. `outcomes` are the sum of rewards and the number of samples of each different
    problem, in the order of the suite, which is the same for all models.
    """

    name: str
    estimate: Estimate
    problems: int
    distinct: int
    samples: int
    truncated: float
    mean_length: float
    verdicts: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Estimate] = field(default_factory=dict)
    refused: int = 0
    outcomes: tuple[tuple[float, int], ...] = ()


@dataclass(frozen=True)
class CapabilityResult:
    """What a model can do of one capability: the unweighted mean of its benchmarks, or its only one."""

    name: str
    benchmarks: tuple[BenchmarkResult, ...]

    @property
    def estimate(self) -> Estimate:
        """The accuracy; of an only benchmark with the interval of that."""
        estimates = [benchmark.estimate for benchmark in self.benchmarks]
        return estimates[0] if len(estimates) == 1 else mean_of(estimates)

    @property
    def mean_length(self) -> float:
        """Tokens of a response."""
        return fmean(benchmark.mean_length for benchmark in self.benchmarks)

    @property
    def truncated(self) -> float:
        """Share of samples cut at the length limit."""
        return fmean(benchmark.truncated for benchmark in self.benchmarks)


@dataclass(frozen=True)
class ModelResult:
    """A model's row of the table."""

    name: str
    capabilities: tuple[CapabilityResult, ...]

    @property
    def benchmarks(self) -> tuple[BenchmarkResult, ...]:
        """Those of all capabilities."""
        return tuple(benchmark for capability in self.capabilities for benchmark in capability.benchmarks)

    @property
    def overall(self) -> Estimate:
        """Unweighted mean over all benchmarks, so over the capabilities where each has one."""
        return mean_of([benchmark.estimate for benchmark in self.benchmarks])
