"""Where a step's time goes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from turned_clock import Clock

from copd_megatron.errors import CopdError
from copd_megatron.observe.timeline import Activity, Timeline, read_timeline


def spend(timeline: Timeline, clock: Clock, activity: Activity, seconds: float) -> None:
    with timeline.span(activity):
        clock.now += seconds


def test_time_belongs_to_the_innermost_activity() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    timeline.begin()
    with timeline.span("rollout"):
        clock.now += 1
        spend(timeline, clock, "wait", 2)
        clock.now += 4
    clock.now += 8
    spend(timeline, clock, "train", 16)
    assert timeline.finish(1) == pytest.approx(
        {
            "time/rollout": 5,
            "time/score": 0,
            "time/train": 16,
            "time/sync": 0,
            "time/wait": 2,
            "time/step": 31,
            "time/between": 0,
        }
    )


def test_what_happens_between_steps_belongs_to_none() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    timeline.begin()
    spend(timeline, clock, "train", 1)
    timeline.finish(1)
    clock.now += 50
    spend(timeline, clock, "score", 4)
    timeline.begin()
    spend(timeline, clock, "train", 2)
    clock.now += 3
    seconds = timeline.finish(2)
    assert (seconds["time/train"], seconds["time/score"]) == pytest.approx((2, 0))
    assert (seconds["time/step"], seconds["time/between"]) == pytest.approx((5, 54))


def test_step_that_was_not_begun_starts_with_its_first_activity() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    for _ in range(2):
        clock.now += 50
        spend(timeline, clock, "train", 1)
        seconds = timeline.finish(1)
        assert (seconds["time/train"], seconds["time/step"], seconds["time/between"]) == pytest.approx((1, 1, 0))


def test_failing_activity_is_over() -> None:
    clock = Clock()
    timeline = Timeline(clock=clock)
    timeline.begin()
    with suppress(RuntimeError), timeline.span("rollout"):
        clock.now += 1
        raise RuntimeError("engine gone")
    spend(timeline, clock, "train", 2)
    assert timeline.finish(1)["time/rollout"] == pytest.approx(1)


def test_display_hears_of_every_change() -> None:
    heard: list[str | None] = []
    clock = Clock()
    timeline = Timeline(on_change=heard.append, clock=clock)
    with timeline.span("rollout"):
        spend(timeline, clock, "wait", 1)
    assert heard == ["rollout", "wait", "rollout", None]


def test_misuse_is_refused() -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match="unknown activity 'lunch'"), timeline.span("lunch"):  # type: ignore[arg-type]
        pass
    with timeline.span("train"), pytest.raises(ValueError, match="step 7 cannot be finished inside the span 'train'"):
        timeline.finish(7)


def test_stretches_can_be_read_back_and_cut_after_a_checkpoint(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(tmp_path / "timeline.jsonl", clock=clock)
    for step in (1, 2, 3):
        timeline.begin()
        spend(timeline, clock, "rollout", 1)
        spend(timeline, clock, "train", step)
        timeline.finish(step)
    timeline.truncate_after(2)
    steps = read_timeline(tmp_path / "timeline.jsonl")
    assert sorted(steps) == [1, 2]
    assert [stretch.activity for stretch in steps[2]] == ["rollout", "train"]
    assert steps[2][1].end - steps[2][1].start == pytest.approx(2, abs=1e-3)
    assert steps[2][0].end == steps[2][1].start
    timeline.begin()
    spend(timeline, clock, "train", 1)
    timeline.finish(3)
    assert sorted(read_timeline(tmp_path / "timeline.jsonl")) == [1, 2, 3]


def test_malformed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "timeline.jsonl"
    path.write_text('{"step":1,"spans":[]}\n{"step":2,"spans":[["train",1]]}\n')
    with pytest.raises(CopdError, match=r"timeline\.jsonl, line 2"):
        read_timeline(path)
