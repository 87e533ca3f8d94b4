"""When a phase ends."""

from copd_megatron.rhythm import FixedRhythm

RHYTHM = FixedRhythm(cycles=2, explore_steps=3, exchange_steps=2)


def all_steps(done):
    for cycle in range(RHYTHM.cycles):
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
