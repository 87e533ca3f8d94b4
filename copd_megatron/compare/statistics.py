"""Accuracy over seeds with bootstrap intervals, and paired differences. Pure functions of outcomes per problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from copd_megatron.randomness import seed_for

Outcomes = Mapping[str, Sequence[Sequence[float]]]
"""What one model made of every problem: [sum of rewards, samples] per problem, by capability, or by
`capability/benchmark` where a capability has several benchmarks."""
OVERALL = "overall"
SEPARATOR = "/"
"""Between a capability and its benchmark; no capability's name has it."""
Numbers = TypeVar("Numbers", float, np.ndarray)


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds between which 95% of its bootstrap replicates lie."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Interval):
    """Of a row and a reference on the same problems and seeds; `p` is the two-sided bootstrap p-value."""

    p: float


@dataclass(frozen=True)
class Accuracy:
    """A row's numbers; `of` maps each capability and `overall`, `versus` references to the same minus theirs.
    `benchmarks` maps `capability/benchmark`, of capabilities that have several.

    `seeds` are those in which the row was run; differences are over those in which the reference was run too.
    """

    seeds: tuple[int, ...]
    of: Mapping[str, Interval]
    versus: Mapping[str, Mapping[str, Difference]]
    benchmarks: Mapping[str, Interval] = field(default_factory=dict)


def accuracies(
    rows: Mapping[str, Mapping[int, Outcomes]], references: Sequence[str], replicates: int = 2000
) -> dict[str, Accuracy]:
    """Every row that has at least one seed. `rows` maps labels to outcomes by seed; 0 to 1, not percent.

    A replicate draws as many seeds as there are, with replacement, and for each of them problems of each benchmark,
    with replacement. A capability is the unweighted mean of its benchmarks, *overall* that of all benchmarks, and a
    row's number the mean over the seeds drawn. All rows share the draws, so differences are paired by problem and seed.
    With one seed the interval is over problems alone. Raises ValueError if models of one seed were tested on different
    problems.
    """
    done = {label: {seed: found[seed] for seed in sorted(found)} for label, found in rows.items() if found}
    _check_same_problems(done)
    results = {}
    for label, found in done.items():
        seeds = tuple(found)
        own = _replicates(found, seeds, replicates)
        points = _points(found, seeds)
        versus = {
            reference: _differences(found, done[reference], replicates)
            for reference in references
            if reference != label and not found.keys().isdisjoint(done.get(reference, {}))
        }
        of = {name: interval_around(points[name], own[name]) for name in points}
        capabilities = {name: interval for name, interval in of.items() if SEPARATOR not in name}
        benchmarks = {name: interval for name, interval in of.items() if SEPARATOR in name}
        results[label] = Accuracy(seeds, capabilities, versus, benchmarks)
    return results


def _differences(
    found: Mapping[int, Outcomes], anchor: Mapping[int, Outcomes], replicates: int
) -> dict[str, Difference]:
    """Of each capability and overall, over the seeds that both have."""
    shared = tuple(seed for seed in found if seed in anchor)
    here, there = _points(found, shared), _points(anchor, shared)
    own, other = _replicates(found, shared, replicates), _replicates(anchor, shared, replicates)
    return {
        name: _difference(here[name] - there[name], own[name] - other[name]) for name in here if SEPARATOR not in name
    }


def _with_means(parts: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """What was found of each benchmark, its mean of each capability that has several, and overall."""
    members: dict[str, list[Numbers]] = {}
    for name, numbers in parts.items():
        members.setdefault(name.partition(SEPARATOR)[0], []).append(numbers)
    capabilities = {name: found[0] if len(found) == 1 else np.mean(found, axis=0) for name, found in members.items()}
    return {**parts, **capabilities, OVERALL: np.mean(list(parts.values()), axis=0)}


def _points(found: Mapping[int, Outcomes], seeds: Sequence[int]) -> dict[str, float]:
    by_seed = []
    for seed in seeds:
        by_seed.append(_with_means({name: _share(problems) for name, problems in found[seed].items()}))
    return {name: float(np.mean([shares[name] for shares in by_seed])) for name in by_seed[0]}


def _share(problems: Sequence[Sequence[float]]) -> float:
    rewards, samples = np.asarray(problems, dtype=np.float64).T
    return float(rewards.sum() / samples.sum())


def _replicates(found: Mapping[int, Outcomes], seeds: Sequence[int], replicates: int) -> dict[str, np.ndarray]:
    """Per benchmark, capability and overall, the replicates [B]. The draws depend on the seeds and names alone."""
    drawn = drawn_seeds(seeds, replicates)
    totals: dict[str, np.ndarray] = {}
    for place in range(len(seeds)):
        for number, seed in enumerate(seeds):
            chosen = drawn[:, place] == number
            for name, problems in found[seed].items():
                rewards, samples = np.asarray(problems, dtype=np.float64).T
                weights = problem_weights(len(rewards), int(chosen.sum()), name, seed, place, *seeds)
                total = totals.setdefault(name, np.zeros(replicates))
                total[chosen] += (weights @ rewards) / (weights @ samples)
    return _with_means({name: total / len(seeds) for name, total in totals.items()})


def drawn_seeds(seeds: Sequence[int], replicates: int) -> np.ndarray:
    """Which of `seeds` take part in each replicate: int [B, len(seeds)], numbers into `seeds`, drawn with
    replacement."""
    generator = np.random.default_rng(seed_for(0, "bootstrap", *seeds))
    return generator.integers(len(seeds), size=(replicates, len(seeds)))


def problem_weights(problems: int, replicates: int, *names: str | int) -> np.ndarray:
    """How often each problem takes part in each replicate: int [B, P], P drawn with replacement.

    The draw depends on its names, so what is measured on the same problems is paired by drawing under the same name.
    """
    chance = np.random.default_rng(seed_for(0, "bootstrap", *names))
    return chance.multinomial(problems, np.full(problems, 1 / problems), replicates)


def interval_around(mean: float, replicates: np.ndarray) -> Interval:
    """The middle 95% of the replicates, and the mean in any case."""
    low, high = np.quantile(replicates, (0.025, 0.975))
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def _difference(mean: float, replicates: np.ndarray) -> Difference:
    interval = interval_around(mean, replicates)
    # One is added on both sides: no finite number of replicates can show a probability of 0.
    count = len(replicates) + 1
    tail = min(int((replicates <= 0).sum()) + 1, int((replicates >= 0).sum()) + 1)
    return Difference(interval.mean, interval.low, interval.high, min(1.0, 2 * tail / count))


def _check_same_problems(rows: Mapping[str, Mapping[int, Outcomes]]) -> None:
    sizes: dict[int, tuple[str, dict[str, list[float]]]] = {}
    for label, found in rows.items():
        for seed, outcomes in found.items():
            samples = {name: [problem[1] for problem in problems] for name, problems in outcomes.items()}
            first, expected = sizes.setdefault(seed, (label, samples))
            if samples != expected:
                raise ValueError(f"seed {seed}: {label!r} and {first!r} were tested on different problems")
