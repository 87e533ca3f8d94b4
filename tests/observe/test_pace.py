"""Time left, and the statuses it is computed from."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from turned_clock import Clock

from copd_megatron.errors import CopdError
from copd_megatron.observe.pace import Pace, RunPlan
from copd_megatron.observe.status import BranchStatus

PLAN = RunPlan(("text", "image"), cycles=2, explore_steps=3, exchange_steps=2)


def status(step: int) -> BranchStatus:
    """As a branch sends it after `step` updates of PLAN."""
    cycle, place = divmod(max(step - 1, 0), 5)
    phase: Literal["explore", "exchange"] = "explore" if place < 3 else "exchange"
    done = (place if phase == "explore" else place - 3) + (step > 0)
    return BranchStatus("train", step, cycle, phase, done, 3 if phase == "explore" else 2)


def run(pace: Pace, clock: Clock, branch: str, seconds: list[float], first: int = 0) -> None:
    pace.observe(branch, status(first))
    for step, duration in enumerate(seconds, start=first + 1):
        clock.now += duration
        pace.observe(branch, status(step))


def test_both_phases_are_weighed_and_the_slowest_branch_decides() -> None:
    clock = Clock()
    pace = Pace(PLAN, clock=clock)
    run(pace, clock, "image", [1, 1, 1, 1])
    run(pace, clock, "text", [1, 1, 1, 5])
    # Left: one exchange step of this cycle, then three explore and two exchange steps.
    assert pace.seconds_left() == pytest.approx(3 * 1 + 3 * 5)


def test_phase_not_seen_yet_is_as_slow_as_the_other() -> None:
    clock = Clock()
    pace = Pace(RunPlan(("text",), 2, 3, 2), clock=clock)
    run(pace, clock, "text", [2, 2])
    assert pace.seconds_left() == pytest.approx(8 * 2)


def test_unknown_until_every_branch_has_made_a_step_and_zero_at_the_end() -> None:
    clock = Clock()
    pace = Pace(PLAN, clock=clock)
    run(pace, clock, "text", [1] * 10)
    assert pace.seconds_left() is None
    run(pace, clock, "image", [1] * 10)
    assert pace.seconds_left() == 0


def test_repeated_status_is_no_step_and_a_restart_from_a_checkpoint_is_no_negative_one() -> None:
    clock = Clock()
    pace = Pace(RunPlan(("text",), 2, 3, 2), clock=clock)
    run(pace, clock, "text", [1, 1])
    clock.now += 1
    pace.observe("text", status(2))
    clock.now += 100
    run(pace, clock, "text", [1, 1], first=1)
    assert pace.seconds_left() == pytest.approx(7 * 1)


def test_old_steps_are_forgotten() -> None:
    clock = Clock()
    pace = Pace(RunPlan(("text",), 1, 100, 0), window=3, clock=clock)
    for step, now in enumerate([0, 50, 51, 52, 53]):
        clock.now = now
        pace.observe("text", BranchStatus("train", step, 0, "explore", step, 100))
    assert pace.seconds_left() == pytest.approx(96)


def test_status_survives_the_wire() -> None:
    sent = BranchStatus("score", 12, 1, "exchange", 2, 10, 0.5, {"image": 0.9}, {"image": 0.2}, 9e3, "checkpoint")
    assert BranchStatus.from_json(sent.to_json()) == sent


def test_number_that_is_not_finite_does_not_break_the_wire() -> None:
    sent = BranchStatus("train", reward=math.nan, overlap={"image": math.nan, "video": 0.8})
    received = BranchStatus.from_json(sent.to_json())
    assert received.reward is None
    assert received.overlap == {"video": 0.8}


@pytest.mark.parametrize("text", ["", "[]", '{"state":"asleep"}', '{"step":1}', '{"state":"train","mood":"good"}'])
def test_anything_else_on_the_wire_is_refused(text: str) -> None:
    with pytest.raises(CopdError, match="expected a branch's status"):
        BranchStatus.from_json(text)
