"""Reasons to leave a phase, on traces that are noisy, stuck, oscillating or full of holes."""

import math
import random
from dataclasses import replace

import pytest
from simulated import BACK, EDGE, LIMITS, reading

from copd_megatron.steering.overlap import why_leave_exchange, why_leave_explore
from copd_megatron.steering.readings import Estimate, Reading, estimate, latest, smoothed

EXACT = replace(LIMITS, smoothing=1.0)


def trace(*overlaps, error=0.0, name=EDGE):
    return {name: [reading(overlap, error) for overlap in overlaps]}


def test_moving_average_and_its_error_are_those_of_the_weighted_sum():
    values = [Estimate(1.0, 0.1), None, Estimate(0.0, 0.2), Estimate(1.0, 0.4)]
    averages = list(smoothed(values, 0.25))
    assert [average.mean for average in averages] == pytest.approx([1.0, 0.75, 0.8125])
    assert averages[-1].error == pytest.approx(math.hypot(0.75**2 * 0.1, 0.75 * 0.25 * 0.2, 0.25 * 0.4))
    assert latest(values, 1.0) == Estimate(1.0, 0.4)
    assert latest([None, None], 0.5) is None


@pytest.mark.parametrize(
    ("mean", "variance", "count"), [(None, 1.0, 4), (math.nan, 1.0, 4), (1.0, math.inf, 4), (1.0, 1.0, 0)]
)
def test_what_cannot_be_estimated_is_missing(mean, variance, count):
    assert estimate(mean, variance, count) is None


def test_error_is_that_of_a_mean():
    assert estimate(0.5, 0.25, 100) == Estimate(0.5, 0.05)


def test_phase_one_ends_when_any_edge_falls_below():
    both = {**trace(0.95, 0.95), **trace(0.95, 0.84, name=BACK)}
    assert why_leave_explore(both, EXACT) == f"overlap of {BACK} fell to 0.840 ± 0.000, below 0.850"
    assert why_leave_explore(trace(0.95, 0.86), EXACT) is None


def test_phase_one_ends_before_overlap_falls_below_if_it_looks_ahead():
    looking = replace(EXACT, ahead=1.0)
    assert why_leave_explore(trace(0.95, 0.91), looking) is None, "0.87 comes next"
    reason = why_leave_explore(trace(0.95, 0.89), looking)
    assert reason == f"overlap of {EDGE} fell to 0.890 ± 0.000, and would fall to 0.830 ± 0.000, below 0.850"
    assert why_leave_explore(trace(0.80, 0.86), looking) is None, "it rises"
    assert why_leave_explore(trace(0.89), looking) is None, "nothing is known of how it falls"
    # sure by 1 standard error, of 2 x 0.01 and 0.01 together
    assert why_leave_explore(trace(0.95, 0.89, error=0.01), looking) is None
    assert why_leave_explore(trace(0.95, 0.88, error=0.01), looking) is not None


def test_one_low_probe_is_not_enough_where_it_is_uncertain():
    assert why_leave_explore(trace(0.95, 0.84, error=0.02), EXACT) is None
    assert why_leave_explore(trace(0.95, 0.84, error=0.005), EXACT) is not None
    assert why_leave_explore(trace(0.95, 0.84, error=0.005), LIMITS) is None, "the average is still at 0.895"


def test_lost_support_ends_phase_one_and_forbids_recovery():
    lost = {EDGE: [reading(0.95, low_support=0.1), reading(0.95, low_support=0.7)]}
    assert "lost support: 0.700" in why_leave_explore(lost, EXACT)
    assert why_leave_explore(lost, replace(EXACT, low_support=None)) is None
    assert why_leave_exchange(lost, EXACT) is None
    assert "rose to" in why_leave_exchange(lost, replace(EXACT, low_support=None))
    back = {EDGE: [*lost[EDGE], reading(0.95, low_support=0.3)]}
    assert "rose to" in why_leave_exchange(back, EXACT)


def test_phase_two_ends_when_every_edge_has_recovered_or_stopped_rising():
    assert why_leave_exchange({**trace(0.8, 0.95), **trace(0.8, 0.85, name=BACK)}, EXACT) is None
    stuck = {**trace(0.8, 0.95, 0.95, 0.95), **trace(0.85, 0.88, 0.88, 0.88, name=BACK)}
    reason = why_leave_exchange(stuck, EXACT)
    assert f"overlap of {EDGE} rose to 0.950" in reason
    assert f"overlap of {BACK} stopped rising at 0.880" in reason


def test_rise_goes_on_as_long_as_one_recent_probe_exceeds_all_before():
    assert why_leave_exchange(trace(0.80, 0.82, 0.84, 0.86), EXACT) is None
    assert why_leave_exchange(trace(0.80, 0.82, 0.81), EXACT) is None
    assert why_leave_exchange(trace(0.80, 0.82, 0.81, 0.815), EXACT) is not None


def test_oscillation_is_not_a_rise():
    assert why_leave_exchange(trace(0.85, 0.88, 0.85, 0.88), EXACT) is not None


def test_too_few_probes_tell_nothing():
    assert why_leave_exchange({}, EXACT) is None
    assert why_leave_exchange(trace(0.8), EXACT) is None
    assert why_leave_exchange(trace(0.8, 0.8), EXACT) is None


def test_holes_are_passed_over():
    assert why_leave_explore(trace(None, 0.9, None, 0.84, None), EXACT) is not None
    assert why_leave_explore(trace(None, None), EXACT) is None
    assert why_leave_exchange(trace(None, None, None, None), EXACT) is None
    assert why_leave_exchange({**trace(0.8, 0.95), **trace(None, None, name=BACK)}, EXACT) is None, (
        "nothing known of it"
    )
    assert why_leave_explore({EDGE: [Reading()]}, EXACT) is None


def test_noise_alone_seldom_ends_a_phase_and_a_real_fall_is_found():
    """Overlap 0.87 measured with an error of 0.01: within two errors of the bound, and never below it."""
    draw = random.Random(0)
    false = sum(
        why_leave_explore(trace(*(draw.gauss(0.87, 0.01) for _ in range(6)), error=0.01), LIMITS) is not None
        for _ in range(500)
    )
    assert false <= 1
    found = sum(
        why_leave_explore(trace(0.9, *(draw.gauss(0.82, 0.01) for _ in range(6)), error=0.01), LIMITS) is not None
        for _ in range(500)
    )
    assert found >= 495
