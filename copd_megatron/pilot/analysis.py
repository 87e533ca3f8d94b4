"""What the students of a pilot study come to, with intervals. Pure functions of results per problem."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from copd_megatron.compare.statistics import Interval, drawn_seeds, interval_around, problem_weights
from copd_megatron.pilot.statistics import Line, fisher, fit, fit_rows, share_absorbed, without_one

Problems = Sequence[Sequence[float]]
"""[sum, count] of every problem: of rewards and samples, or of a quantity and tokens. The value over several problems
is the total of the sums over that of the counts."""

GAIN_TEST = "gain"
LEAST_DEFINED = 0.95
"""Share of the replicates in which a number must be defined for its interval to be given."""
GRID = 25
"""Places at which the band around a line is given."""


@dataclass(frozen=True)
class Quantity:
    """Something measured on a model. What has the same `test` was measured on the same problems, and is paired."""

    test: str
    problems: Problems


@dataclass(frozen=True)
class Student:
    """A student before and after its distillation, and its teacher, on the same test problems of the teacher's
    capability; and what was measured before. `after` is None for a student that has not been distilled."""

    seed: int
    updates: int
    before: Problems
    after: Problems | None
    teacher: Problems
    predictors: Mapping[str, Quantity]


@dataclass(frozen=True)
class Relation:
    """How the share absorbed goes with one predictor.

    `line` is None with fewer than three students or where one side does not vary. `over_problems` and `r2` are the
    bootstrap intervals of r and r² over problems (and seeds): other problems, the same students. `over_students` is
    Fisher's interval of r, for other students like these; `without_one` are the smallest and largest r of all students
    but one. `band` is the bootstrap band of the line, (x, low, high).
    """

    line: Line | None
    over_problems: Interval | None
    over_students: tuple[float, float] | None
    without_one: tuple[float, float] | None
    r2: Interval | None
    band: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Analysis:
    """By (seed, updates) the share absorbed, None where it is not defined, and each predictor's value; by predictor how
    the two go together."""

    gains: Mapping[tuple[int, int], Interval | None]
    values: Mapping[tuple[int, int], Mapping[str, Interval]]
    relations: Mapping[str, Relation]


def analyse(students: Sequence[Student], least_advantage: float, replicates: int = 2000) -> Analysis:
    """Everything about `students`, of one seed or of several.

    A replicate draws as many seeds as there are, with replacement, and for each of them problems of each test, with
    replacement. All models of a seed share the draw, so that the shares absorbed are paired by problem, before with
    after and student with student. With one seed the draw is over problems alone. Raises ValueError if models of one
    seed were measured on different numbers of problems of a test.
    """
    seeds = sorted({student.seed for student in students})
    names = list(dict.fromkeys(name for student in students for name in student.predictors))
    chosen = drawn_seeds(seeds, replicates)
    draws = {seed: [_Draw(replicates, seed, place, *seeds) for place in range(len(seeds))] for seed in seeds}
    gains: dict[tuple[int, int], Interval | None] = {}
    values: dict[tuple[int, int], dict[str, Interval]] = {}
    points: dict[str, list[float]] = {name: [] for name in (GAIN_TEST, *names)}
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (GAIN_TEST, *names)}
    for student in students:
        key = student.seed, student.updates
        point = _gain(student, None, least_advantage)
        drawn = [_gain(student, draw, least_advantage) for draw in draws[student.seed]]
        gains[key] = _interval(float(point), drawn[0])
        values[key] = {}
        points[GAIN_TEST].append(float(point))
        columns[GAIN_TEST] += _where_chosen(drawn, chosen, seeds.index(student.seed))
        for name in names:
            quantity = student.predictors.get(name)
            if quantity is None:
                value, drawn = math.nan, [np.full(replicates, math.nan)] * len(seeds)
            else:
                value = float(_value(quantity, None))
                drawn = [_value(quantity, draw) for draw in draws[student.seed]]
                values[key][name] = interval_around(value, drawn[0])
            points[name].append(value)
            columns[name] += _where_chosen(drawn, chosen, seeds.index(student.seed))
    y, ys = points[GAIN_TEST], np.stack(columns[GAIN_TEST], axis=1)
    relations = {name: _relation(points[name], y, np.stack(columns[name], axis=1), ys) for name in names}
    return Analysis(gains, values, relations)


def value_of(quantity: Quantity, seed: int, replicates: int = 2000) -> Interval:
    """A quantity's value with its interval by bootstrap over problems."""
    return interval_around(float(_value(quantity, None)), _value(quantity, _Draw(replicates, seed)))


class _Draw:
    """The problems drawn in every replicate at one place, by test."""

    def __init__(self, replicates: int, *names: int) -> None:
        self._replicates = replicates
        self._names = names
        self._weights: dict[str, np.ndarray] = {}

    def of(self, test: str, problems: int) -> np.ndarray:
        """int [B, P]"""
        if test not in self._weights:
            self._weights[test] = problem_weights(problems, self._replicates, test, *self._names)
        if (other := self._weights[test].shape[1]) != problems:
            raise ValueError(f"seed {self._names[0]}, {test}: measured on {other} problems, and on {problems}")
        return self._weights[test]


def _value(quantity: Quantity, draw: _Draw | None) -> np.ndarray:
    """The value [] over all problems, or [B] over those drawn."""
    sums, counts = np.asarray(quantity.problems, dtype=np.float64).T
    weights = np.ones(len(sums)) if draw is None else draw.of(quantity.test, len(sums))
    return np.asarray((weights @ sums) / (weights @ counts))


def _gain(student: Student, draw: _Draw | None, least: float) -> np.ndarray:
    if student.after is None:
        return np.full_like(_value(Quantity(GAIN_TEST, student.before), draw), math.nan)
    before, after, teacher = (
        _value(Quantity(GAIN_TEST, problems), draw) for problems in (student.before, student.after, student.teacher)
    )
    return share_absorbed(before, after, teacher, least)


def _where_chosen(drawn: Sequence[np.ndarray], chosen: np.ndarray, seed: int) -> list[np.ndarray]:
    """A column [B] for each place that a seed can have in a replicate; NaN where it has another seed."""
    return [np.where(chosen[:, place] == seed, column, math.nan) for place, column in enumerate(drawn)]


def _relation(x: Sequence[float], y: Sequence[float], xs: np.ndarray, ys: np.ndarray) -> Relation:
    line = fit(x, y)
    if line is None:
        return Relation(None, None, None, None, None, ())
    slopes, intercepts, r = fit_rows(xs, ys)
    over_problems = _interval(line.r, r)
    known = [value for value, gain in zip(x, y, strict=True) if math.isfinite(value) and math.isfinite(gain)]
    grid = np.linspace(min(known), max(known), GRID)
    band: tuple[tuple[float, float, float], ...] = ()
    if over_problems is not None:
        heights = (intercepts[:, None] + slopes[:, None] * grid)[np.isfinite(r)]
        low, high = np.quantile(heights, (0.025, 0.975), axis=0)
        band = tuple(zip(grid.tolist(), low.tolist(), high.tolist(), strict=True))
    r2 = _interval(line.r2, r**2)
    return Relation(line, over_problems, fisher(line.r, line.n), without_one(x, y), r2, band)


def _interval(point: float, drawn: np.ndarray) -> Interval | None:
    """None where the point is not defined, or too few of the replicates are."""
    defined = drawn[np.isfinite(drawn)]
    if not math.isfinite(point) or len(defined) < LEAST_DEFINED * len(drawn):
        return None
    return interval_around(point, defined)
