"""The live display, drawn into memory."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from copd_megatron.observe.pace import RunPlan
from copd_megatron.observe.progress import Progress, duration, rate, sparkline
from copd_megatron.observe.status import BranchStatus


def display(width: int, *branches: str) -> Progress:
    console = Console(file=io.StringIO(), width=width, height=40, force_terminal=True, color_system=None)
    return Progress(RunPlan(branches or ("text", "image"), 4, 15, 10), "runs/mini", console)


def drawn(progress: Progress) -> list[str]:
    with progress.console.capture() as capture:
        progress.console.print(progress.render())
    return capture.get().splitlines()


def status(step: int = 18, teacher: str = "image", **values: object) -> BranchStatus:
    defaults: dict[str, object] = {
        "state": "score",
        "step": step,
        "cycle": 0,
        "phase": "exchange",
        "phase_step": 3,
        "phase_steps": 10,
        "reward": 0.625,
        "overlap": {teacher: 0.912},
        "symkl": {teacher: 0.168},
        "tokens_per_second": 12_345.0,
    }
    return BranchStatus(**(defaults | values))  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [80, 120])
def test_every_number_is_readable_at_this_width(width: int) -> None:
    progress = display(width, "text_reasoning", "image", "video")
    progress.update("text_reasoning", status(overlap={"image": 0.912, "video": 0.873}, event="checkpoint at step 15"))
    progress.update("image", status(state="checkpoint"))
    lines = drawn(progress)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for shown in ("1/4", "exchange", "3/10", "0.625", "0.912", "0.873", "0.168", "12.3k", "score", "checkpoint", "12%"):
        assert shown in text, f"{shown} in\n{text}"
    assert "checkpoint at step 15" in text
    assert ("text_reasoning" in lines[3]) == (width == 120)
    assert ("trend" in text) == (width == 120)
    assert re.search(r"video +– .*starting", text)


def test_reward_is_smoothed_over_steps_not_over_repeated_statuses() -> None:
    progress = display(80)
    progress.update("text", status(step=1, reward=0.0))
    for _ in range(5):
        progress.update("text", status(step=2, reward=1.0))
    assert "0.200" in "\n".join(drawn(progress))


def test_event_is_shown_once_and_shared_by_the_branches_it_happened_to() -> None:
    progress = display(80)
    for branch in ("text", "image", "text", "image"):
        progress.update(branch, status(event="checkpoint at step 15"))
    progress.event("run", "merged")
    lines = [line for line in drawn(progress) if "checkpoint at" in line or "merged" in line]
    assert len(lines) == 2
    assert "text, image checkpoint at step 15" in lines[0]


def test_names_are_text_and_not_markup() -> None:
    progress = display(120, "[red]x[/red]", "image")
    progress.update("[red]x[/red]", status(event="[bold]skipped[/bold] step 3"))
    text = "\n".join(drawn(progress))
    assert text.count("[red]x[/red]") == 2
    assert "[bold]skipped[/bold] step 3" in text


def test_unknown_branch_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown branch 'audio'; the plan has text, image"):
        display(80).update("audio", status())


def test_without_terminal_there_is_one_line_every_few_steps() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=False)
    with Progress(RunPlan(("text",), 4, 15, 10), "runs/mini", console, every=10) as progress:
        for step in range(101):
            for state in ("rollout", "train"):
                progress.update("text", status(step=step, state=state, event="skipped step 12" if step > 11 else None))
        progress.update("text", status(step=100, state="done"))
    lines = file.getvalue().splitlines()
    steps = [int(found[1]) for line in lines if (found := re.search(r"text: step (\d+)/100", line))]
    assert steps == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 100]
    assert sum("skipped step 12" in line for line in lines) == 1
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert "overlap image 0.912, symkl image 0.168, 12.3k tok/s" in lines[1]
    assert "\x1b" not in file.getvalue()


def test_terminal_display_starts_and_stops() -> None:
    progress = display(80)
    with progress:
        progress.update("text", status())
    written = progress.console.file.getvalue()  # type: ignore[attr-defined]
    assert "runs/mini" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (7.4, "7"), (999.4, "999"), (999.6, "1.0k"), (999_499, "999.5k"), (2.34e6, "2.3M")]
)
def test_rate_is_short(value: float | None, text: str) -> None:
    assert rate(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3723, "1:02:03")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sparkline_spans_minimum_to_maximum_and_keeps_its_width() -> None:
    assert sparkline([], 4) == ""
    assert sparkline([0.5], 4) == "▄"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert len(sparkline([float(i) for i in range(100)], 12)) == 12
