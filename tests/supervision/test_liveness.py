"""Who is taken for failed, by a clock that the tests turn."""

from __future__ import annotations

import pytest
from turned_clock import Clock

from copd_megatron.config.supervision import SupervisionConfig
from copd_megatron.supervision.liveness import Liveness

SETTINGS = SupervisionConfig(heartbeat_seconds=60, stall_seconds=600)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def liveness(clock: Clock) -> Liveness:
    return Liveness(["text", "image"], SETTINGS, clock)


def test_ranks_that_beat_and_branches_that_move_are_well(liveness: Liveness, clock: Clock) -> None:
    for second in range(0, 3000, 10):
        clock.now = 1000.0 + second
        for name in ("text", "image"):
            liveness.hear(name, f"step {second // 300}", False, {0: second, 1: second})
        assert liveness.notices() == liveness.failures() == []


def test_a_rank_without_a_beat_is_late_and_then_failed(liveness: Liveness, clock: Clock) -> None:
    for second in range(0, 61, 5):
        clock.now = 1000.0 + second
        liveness.hear("text", "train", False, {0: second, 1: 0})
        liveness.hear("image", "train", False, {0: second})
        assert bool(liveness.notices()) == (second == 35)  # once, after half of the time
        assert liveness.failures() == []
    clock.now += 1
    ((branch, reason),) = liveness.failures()
    assert branch == "text"
    assert "no sign of life from rank 1 for 60 s" in reason


def test_a_rank_that_was_cut_off_comes_back(liveness: Liveness, clock: Clock) -> None:
    liveness.hear("text", "train", False, {0: 1})
    clock.now += 50
    liveness.hear("text", "train", False, {0: 1})
    assert liveness.notices() == [("text", "warning", "no sign of life from rank 0 for 50 s")]
    liveness.hear("text", "train", False, {0: 2})
    assert liveness.notices() == [("text", "recovery", "rank 0 is back")]
    assert liveness.notices() == []
    assert liveness.failures() == []


def test_a_conductor_that_was_stopped_itself_accuses_nobody(liveness: Liveness, clock: Clock) -> None:
    liveness.hear("text", "train 1", False, {0: 1})
    clock.now += 10_000
    liveness.hear("text", "train 2", False, {0: 5000})
    liveness.hear("image", "train 2", False, {0: 5000})
    assert liveness.failures() == liveness.notices() == []


def test_a_branch_that_beats_but_does_not_move_is_stuck_and_one_that_waits_for_it_is_not(
    liveness: Liveness, clock: Clock
) -> None:
    for second in range(0, 620, 10):
        clock.now = 1000.0 + second
        liveness.hear("text", "rollout", False, {0: second})
        liveness.hear("image", "wait", True, {0: second})
    ((branch, reason),) = liveness.failures()
    assert branch == "text"
    assert "without progress for 600 s" in reason


def test_branches_that_wait_for_each_other_are_all_stuck(liveness: Liveness, clock: Clock) -> None:
    for second in range(0, 620, 10):
        clock.now = 1000.0 + second
        for name in ("text", "image"):
            liveness.hear(name, "wait", True, {0: second})
    assert [branch for branch, _ in liveness.failures()] == ["image", "text"]


def test_a_branch_that_never_says_anything_is_stuck(liveness: Liveness, clock: Clock) -> None:
    clock.now += 601
    liveness.hear("text", "train", False, {})
    liveness.hear("image", None, False, {})
    assert [branch for branch, _ in liveness.failures()] == ["image"]


def test_nothing_is_expected_of_a_branch_that_has_ended(liveness: Liveness, clock: Clock) -> None:
    liveness.hear("text", "train", False, {0: 1})
    liveness.gone("text")
    clock.now += 500
    liveness.hear("image", "train", False, {0: 1})
    assert liveness.failures() == []
