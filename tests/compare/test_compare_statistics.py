"""Intervals and paired differences over seeds."""

import math
import random

import pytest

from copd_megatron.compare.statistics import OVERALL, accuracies


def drawn(share, problems=400, seed=0):
    draw = random.Random(seed)
    return [[float(draw.random() < share), 1] for _ in range(problems)]


def test_interval_over_problems_is_that_of_a_proportion():
    row = accuracies({"CoPD": {0: {"text": drawn(0.6, 1000)}}}, ["CoPD"])["CoPD"].of["text"]
    half = 1.96 * math.sqrt(row.mean * (1 - row.mean) / 1000)
    assert row.low == pytest.approx(row.mean - half, abs=0.004)
    assert row.high == pytest.approx(row.mean + half, abs=0.004)


def test_overall_is_the_unweighted_mean_over_capabilities():
    outcomes = {"text": [[1.0, 1]] * 10, "image": [[0.0, 1]] * 1000}
    found = accuracies({"CoPD": {0: outcomes}}, ["CoPD"])["CoPD"].of
    assert (found["text"].mean, found["image"].mean, found[OVERALL].mean) == (1.0, 0.0, 0.5)
    assert (found[OVERALL].low, found[OVERALL].high) == (0.5, 0.5)


def test_capability_is_the_mean_of_its_benchmarks_and_overall_of_all():
    outcomes = {"text/AIME24": [[1.0, 2]] * 30, "text/MATH-500": [[1.0, 1]] * 500, "image": [[0.0, 1]] * 10}
    found = accuracies({"CoPD": {0: outcomes}}, ["CoPD"])["CoPD"]
    assert {name: value.mean for name, value in found.of.items()} == {"text": 0.75, "image": 0.0, OVERALL: 0.5}
    assert {name: value.mean for name, value in found.benchmarks.items()} == {"text/AIME24": 0.5, "text/MATH-500": 1.0}


def test_problems_are_drawn_within_each_benchmark():
    few, many = drawn(0.5, 30), drawn(0.5, 3000)
    rows = {"CoPD": {0: {"text/few": few, "text/many": many}}, "base": {0: {"text/few": few, "text/many": many}}}
    found = accuracies(rows, ["CoPD"])["CoPD"]
    half = 1.96 * math.sqrt(0.25 / 30 + 0.25 / 3000) / 2
    assert found.of["text"].high - found.of["text"].mean == pytest.approx(half, abs=0.015)
    assert found.of["text"] == found.of[OVERALL]
    versus = accuracies(rows, ["CoPD"])["base"].versus["CoPD"]
    assert set(versus) == {"text", OVERALL}
    assert (versus["text"].low, versus["text"].high, versus["text"].p) == (0, 0, 1.0)


def test_single_benchmark_is_drawn_as_its_capability_was():
    """The numbers of comparisons that were made before there were benchmarks stay."""
    found = accuracies({"CoPD": {0: {"text": drawn(0.6, 50), "image": drawn(0.3, 40)}}}, ["CoPD"], 300)["CoPD"]
    rounded = {name: (round(one.mean, 4), round(one.low, 4), round(one.high, 4)) for name, one in found.of.items()}
    assert rounded == {
        "text": (0.52, 0.38, 0.6505),
        "image": (0.15, 0.05, 0.25),
        OVERALL: (0.335, 0.255, 0.4113),
    }
    assert found.benchmarks == {}


def test_problems_with_several_samples_weigh_as_many():
    found = accuracies({"CoPD": {0: {"text": [[3.0, 4], [0.0, 1]]}}}, ["CoPD"])["CoPD"]
    assert found.of["text"].mean == pytest.approx(0.6)


def test_spread_over_seeds_is_in_the_interval():
    alike = {seed: {"text": drawn(0.5, seed=seed)} for seed in range(3)}
    apart = {seed: {"text": drawn(0.2 + 0.3 * seed, seed=seed)} for seed in range(3)}
    width = {
        name: (lambda row: row.high - row.low)(accuracies({"CoPD": found}, ["CoPD"])["CoPD"].of["text"])
        for name, found in {"alike": alike, "apart": apart}.items()
    }
    assert width["alike"] < 0.08
    assert width["apart"] > 0.3


def test_difference_is_paired_by_problem():
    base = drawn(0.5, 400)
    better = [[max(reward, float(number % 20 == 0)), 1] for number, (reward, _) in enumerate(base)]
    rows = {"CoPD": {0: {"text": better}}, "base": {0: {"text": base}}}
    found = accuracies(rows, ["CoPD"])
    versus = found["base"].versus["CoPD"]["text"]
    assert versus.mean == pytest.approx(found["base"].of["text"].mean - found["CoPD"].of["text"].mean)
    assert versus.high - versus.low < 0.04 < found["base"].of["text"].high - found["base"].of["text"].low
    assert versus.high < 0
    assert versus.p < 0.01
    assert found["CoPD"].versus == {}


def test_rows_are_compared_with_every_reference():
    rows = {name: {0: {"text": drawn(share, 400)}} for name, share in (("base", 0.2), ("MOPD", 0.5), ("CoPD", 0.7))}
    found = accuracies(rows, ["CoPD", "MOPD", "not run"])
    assert {label: list(row.versus) for label, row in found.items()} == {
        "base": ["CoPD", "MOPD"],
        "MOPD": ["CoPD"],
        "CoPD": ["MOPD"],
    }
    for label, reference in (("base", "MOPD"), ("CoPD", "MOPD"), ("base", "CoPD")):
        mean = found[label].of["text"].mean - found[reference].of["text"].mean
        assert found[label].versus[reference]["text"].mean == pytest.approx(mean)


def test_equal_rows_do_not_differ():
    outcomes = {seed: {"text": drawn(0.5, seed=seed)} for seed in range(3)}
    versus = accuracies({"CoPD": outcomes, "twin": dict(outcomes)}, ["CoPD"])["twin"].versus["CoPD"][OVERALL]
    assert (versus.mean, versus.low, versus.high, versus.p) == (0, 0, 0, 1.0)


def test_p_values_of_equally_good_rows_are_seldom_small():
    small = 0
    for trial in range(60):
        rows = {name: {0: {"text": drawn(0.5, 200, seed=(trial, name).__repr__())}} for name in ("CoPD", "other")}
        small += accuracies(rows, ["CoPD"], replicates=400)["other"].versus["CoPD"]["text"].p < 0.05
    assert small <= 9, "3 expected"


def test_only_seeds_that_both_have_are_compared():
    rows = {
        "CoPD": {seed: {"text": [[1.0, 1]] * 5} for seed in (0, 1)},
        "mixed": {1: {"text": [[1.0, 1]] * 5}, 2: {"text": [[0.0, 1]] * 5}},
        "MOPD": {},
    }
    found = accuracies(rows, ["CoPD"])
    assert set(found) == {"CoPD", "mixed"}
    assert found["mixed"].seeds == (1, 2)
    assert found["mixed"].of["text"].mean == 0.5
    assert found["mixed"].versus["CoPD"]["text"].mean == 0.0
    alone = accuracies({"mixed": rows["mixed"]}, ["CoPD"])["mixed"]
    assert alone.versus == {}


def test_other_problems_are_refused():
    rows = {"CoPD": {0: {"text": drawn(0.5, 10)}}, "mixed": {0: {"text": drawn(0.5, 11)}}}
    with pytest.raises(ValueError, match="tested on different problems"):
        accuracies(rows, ["CoPD"])


def test_the_same_numbers_come_out_again():
    rows = {"CoPD": {seed: {"text": drawn(0.5, seed=seed)} for seed in range(2)}}
    assert accuracies(rows, ["CoPD"]) == accuracies(rows, ["CoPD"])
