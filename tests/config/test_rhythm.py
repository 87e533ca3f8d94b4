"""When a phase ends."""

import pytest
from pydantic import ValidationError

from copd_megatron.config.rhythm import RhythmConfig
from copd_megatron.rhythm import FixedRhythm

RHYTHM = FixedRhythm(cycles=2, explore_steps=3, exchange_steps=2)


def all_steps(done):
    for cycle in RHYTHM:
        yield from RHYTHM.explore(cycle, done)
        yield from RHYTHM.exchange(cycle, done)


def test_steps_are_numbered_through_the_run_without_gap():
    steps = list(all_steps(done=0))
    assert [step.number for step in steps] == list(range(RHYTHM.total)) == list(range(10))
    assert [step.phase for step in steps[:5]] == ["explore"] * 3 + ["exchange"] * 2
    assert [step.cycle for step in steps] == [0] * 5 + [1] * 5


def test_after_any_number_of_updates_exactly_the_rest_is_left():
    whole = list(all_steps(done=0))
    for done in range(RHYTHM.total + 1):
        assert list(all_steps(done)) == whole[done:]


def test_phase_ends_are_marked():
    closing = [step.number for step in all_steps(0) if step.closes_phase]
    opening = [step.number for step in all_steps(0) if step.opens_phase]
    assert closing == [2, 4, 7, 9]
    assert opening == [0, 3, 5, 8]


def test_steered_rhythm_has_the_same_number_of_updates():
    fixed, steered = RhythmConfig(cycles=3), RhythmConfig.model_validate("overlap")
    assert isinstance(fixed.open(), FixedRhythm)
    assert fixed.open().total == 75
    assert steered.kind == "overlap"
    assert steered.open().total == 100
    assert (steered.lengths.explore, steered.lengths.exchange, steered.lengths.last) == ((5, 30), (3, 20), 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"explore_steps": 0}, "needs both phases"),
        ({"explore_bounds": (20, 30)}, r"explore_bounds = \[20, 30\]: expected \[shortest, longest\] around"),
        ({"exchange_bounds": (0, 30)}, "exchange_bounds"),
        ({"low": 0.95, "high": 0.9}, "low = 0.95 must be below high = 0.9"),
        ({"range": (0.9, 0.9)}, "range"),
    ],
)
def test_impossible_steering_is_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        RhythmConfig(kind="overlap", **changes)
