"""What a Phase II absorbed, and bounds that follow the best."""

from dataclasses import replace

import pytest
from simulated import BACK, EDGE, LIMITS, reading

from copd_megatron.steering.absorption import Absorbed, Search, absorbed, moved
from copd_megatron.steering.readings import Estimate, Reading

SEARCH = Search(rate=0.5, memory=3, least=0.5, most=1.0)


def phase(gain, start=0.8, end=0.9, error=0.0):
    return Absorbed(start, end, Estimate(gain, error))


def test_gain_is_the_share_of_divergence_gone_and_the_rise_in_reward_per_update():
    before = {EDGE: reading(0.8, kl_teacher=0.4, reward=0.3), BACK: reading(0.7, kl_teacher=0.2, reward=0.5)}
    after = {EDGE: reading(0.9, kl_teacher=0.1, reward=0.4), BACK: reading(0.95, kl_teacher=0.2, reward=0.4)}
    result = absorbed(before, after, steps=10)
    assert result.gain.mean == pytest.approx(((0.75 + 0.1) + (0.0 - 0.1)) / 2 / 10)
    assert (result.start, result.end) == (0.7, 0.9)
    assert result.gain.error == 0.0


def test_error_of_the_gain_carries_those_of_the_probes():
    before, after = {EDGE: reading(0.8, 0.03, reward=0.3)}, {EDGE: reading(0.9, 0.04, reward=0.4)}
    assert absorbed(before, after, steps=10).gain.error == pytest.approx(0.005)


def test_missing_parts_are_left_out_and_too_little_is_nothing():
    before, after = {EDGE: reading(0.8, reward=0.3)}, {EDGE: reading(0.9, reward=0.5, kl_teacher=0.1)}
    assert absorbed(before, after, 10).gain.mean == pytest.approx(0.02)
    assert absorbed({EDGE: Reading()}, after, 10) is None
    assert absorbed({}, {}, 10) is None
    assert absorbed(before, {BACK: reading(0.9, reward=0.5)}, 10) is None
    noise = {EDGE: reading(0.8, 0.1, kl_teacher=0.15)}
    assert absorbed(noise, noise, 10) is None, "a divergence that is not surely there cannot be absorbed"


def test_bounds_go_half_way_to_the_best_phase():
    limits = moved(LIMITS, [phase(0.01, 0.7, 0.8), phase(0.05, 0.81, 0.96), phase(0.02)], SEARCH, 1.0)
    assert (limits.low, limits.high) == pytest.approx((0.83, 0.94))
    assert replace(limits, low=LIMITS.low, high=LIMITS.high) == LIMITS


def test_last_phase_is_followed_where_an_earlier_one_is_not_surely_better():
    history = [phase(0.05, 0.6, 0.7, error=0.02), phase(0.04, 0.81, 0.96, error=0.02)]
    assert moved(LIMITS, history, SEARCH, 1.0).low == pytest.approx(0.83)
    assert moved(LIMITS, history, SEARCH, 0.0).low == pytest.approx(0.725)


def test_old_phases_are_forgotten():
    history = [phase(0.9, 0.5, 0.6), *[phase(0.01, 0.85, 0.92)] * 3]
    assert moved(LIMITS, history, SEARCH, 1.0) == LIMITS
    assert moved(LIMITS, [], SEARCH, 1.0) == LIMITS


def test_bounds_stay_apart_and_in_range():
    limits = LIMITS
    for _ in range(50):
        limits = moved(limits, [phase(0.1, 1.0, 0.1)], SEARCH, 1.0)
    assert 0.5 <= limits.low < limits.high <= 1.0
    for _ in range(50):
        limits = moved(limits, [phase(0.1, 0.0, 0.0)], SEARCH, 1.0)
    assert limits.low == pytest.approx(0.5)
    assert limits.high == pytest.approx(0.51)
