from __future__ import annotations

import math
import random

import pytest

from copd_megatron.evaluate.intervals import accuracy_of, mean_of, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(successes: int, trials: int, low: float, high: float) -> None:
    found = wilson(successes / trials, trials)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


def test_an_interval_always_holds_its_accuracy() -> None:
    for trials in (1, 3, 7, 1000, 12.5):
        for accuracy in (0.0, 1e-12, 0.3, 1 - 1e-12, 1.0):
            found = wilson(accuracy, trials)
            assert 0 <= found.low <= found.accuracy <= found.high <= 1


def test_one_sample_per_problem_is_one_trial_per_problem() -> None:
    rewards = [[1.0]] * 30 + [[0.0]] * 70
    assert accuracy_of(rewards) == wilson(0.3, 100)


def test_samples_that_always_agree_are_worth_one_each() -> None:
    rewards = [[1.0] * 8] * 30 + [[0.0] * 8] * 70
    assert accuracy_of(rewards).trials == pytest.approx(100, rel=0.01)
    assert accuracy_of(rewards).trials >= 100


def test_samples_that_are_independent_are_worth_all_of_them() -> None:
    random_numbers = random.Random(0)
    rewards = [[float(random_numbers.random() < 0.4) for _ in range(8)] for _ in range(2000)]
    assert accuracy_of(rewards).trials == pytest.approx(16_000, rel=0.1)


def test_a_problem_that_is_asked_more_often_counts_for_less_than_its_samples() -> None:
    # Ten copies of one problem beside ninety others: not a hundred trials.
    rewards = [[1.0] * 10] + [[float(number % 2)] for number in range(90)]
    assert accuracy_of(rewards).accuracy == pytest.approx(0.55)
    assert accuracy_of(rewards).trials == pytest.approx(100**2 / (10**2 + 90), rel=0.2)
    assert accuracy_of(rewards).trials < 65


def test_repeated_samples_of_all_or_nothing_claim_no_certainty() -> None:
    assert accuracy_of([[1.0] * 16] * 10) == wilson(1.0, 10)
    assert accuracy_of([[0.0] * 16] * 10) == wilson(0.0, 10)


def test_clustered_intervals_hold_their_level_where_naive_ones_do_not() -> None:
    random_numbers = random.Random(1)
    covered = naive = 0
    for _ in range(400):
        difficulty = [random_numbers.betavariate(0.5, 0.5) for _ in range(60)]
        rewards = [[float(random_numbers.random() < share) for _ in range(8)] for share in difficulty]
        found = accuracy_of(rewards)
        covered += found.low <= 0.5 <= found.high
        unclustered = wilson(found.accuracy, 480)
        naive += unclustered.low <= 0.5 <= unclustered.high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.8


def test_the_mean_over_capabilities_follows_its_formula() -> None:
    estimates = [wilson(0.6, 400), wilson(0.2, 100)]
    found = mean_of(estimates)
    z = 1.959964
    variance = 0.0
    for share, trials in ((0.6, 400), (0.2, 100)):
        adjusted = (share * trials + z * z / 2) / (trials + z * z)
        variance += adjusted * (1 - adjusted) / (trials + z * z)
    assert found.accuracy == pytest.approx(0.4)
    assert found.high - 0.4 == pytest.approx(z * math.sqrt(variance) / 2, rel=1e-5)
    assert 0.4 - found.low == pytest.approx(found.high - 0.4)


def test_the_mean_of_many_capabilities_is_surer_than_one_and_holds_its_level() -> None:
    random_numbers = random.Random(2)
    truth = (0.3, 0.55, 0.9)
    covered = 0
    for _ in range(400):
        shares = [sum(random_numbers.random() < share for _ in range(200)) / 200 for share in truth]
        found = mean_of([wilson(share, 200) for share in shares])
        covered += found.low <= sum(truth) / 3 <= found.high
    assert 0.92 <= covered / 400 <= 0.98


def test_a_capability_at_zero_is_not_taken_for_certain() -> None:
    found = mean_of([wilson(0.0, 50), wilson(0.0, 50)])
    assert found.low == 0.0
    assert found.high > 0.02


def test_what_is_no_accuracy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"accuracy is 1\.5 and trials 10"):
        wilson(1.5, 10)
    with pytest.raises(ValueError, match="trials 0"):
        wilson(0.5, 0)
    with pytest.raises(ValueError, match="rewards of 0 problems"):
        accuracy_of([])
    with pytest.raises(ValueError, match="one sample of each"):
        accuracy_of([[1.0], []])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        accuracy_of([[2.0]])
    with pytest.raises(ValueError, match="no accuracies"):
        mean_of([])
