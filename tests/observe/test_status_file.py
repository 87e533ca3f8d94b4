"""The conductor's note, and the page that `copd status` makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from rich.console import Console
from turned_clock import Clock

from copd_megatron.errors import ConfigError, CopdError, Interrupted
from copd_megatron.observe.status import BranchStatus
from copd_megatron.observe.status_file import StatusFile, read_status
from copd_megatron.observe.status_page import status_page

CONFIG = {
    "base": "base",
    "branches": [
        {"name": "text", "data": {"mini": {"modality": "text"}}},
        {"name": "image", "data": {"mini": {"modality": "image"}}},
    ],
    "rhythm": {"cycles": 4, "explore_steps": 15, "exchange_steps": 10},
}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def status(step: int, state: str = "train") -> BranchStatus:
    return BranchStatus(state, step, step // 25, "explore", step % 25, 15, reward=0.25)  # type: ignore[arg-type]


def page(run: Path, clock: Clock) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_page(run, clock))
    return console.export_text()


def trained(run: Path, clock: Clock) -> StatusFile:
    """A run of 2 s a step, both branches at step 30."""
    note = StatusFile(run / "status.json", clock)
    note.enter("training")
    for step in range(28, 31):
        clock.now += 2
        note.observe({"text": status(step), "image": status(step)}, 75.0)
    return note


def test_page_shows_cycle_phase_health_and_time_left(run: Path, clock: Clock) -> None:
    note = trained(run, clock)
    clock.now += 10
    note.observe({"text": status(30), "image": status(30, "wait")}, 75.0)
    shown = page(run, clock)
    assert "training, 1:15 left" in shown
    assert shown.count(" ok\n") == 2
    row = next(line.split() for line in shown.splitlines() if line.startswith("image"))
    assert row == ["image", "2/4", "explore", "5/15", "30/100", "2.00", "0.250", "wait", "ok"]
    assert "no checkpoint yet" in shown


def test_a_branch_that_says_nothing_is_silent_by_the_conductors_clock(run: Path, clock: Clock) -> None:
    note = trained(run, clock)
    for step in range(31, 66):
        clock.now += 2
        note.observe({"text": status(step), "image": status(30)}, None)
    clock.now += 7 * 3600  # the reader's clock is wrong, or in another zone
    shown = page(run, clock)
    assert "silent for 1:06" in shown
    assert shown.count("silent") == 1
    assert "time left unknown" in shown


def test_a_conductor_that_says_nothing_is_gone(run: Path, clock: Clock) -> None:
    trained(run, clock)
    assert "no word" not in page(run, clock)
    clock.now += 100
    assert "no word from the conductor for 1:4" in page(run, clock)


def test_note_is_not_written_at_every_look(run: Path, clock: Clock) -> None:
    note = StatusFile(run / "status.json", clock)
    note.observe({"text": status(1)}, None)
    clock.now += 1
    note.observe({"text": status(2)}, None)
    assert read_status(run / "status.json").branches["text"].status.step == 1
    clock.now += 5
    note.observe({"text": status(2)}, None)
    assert read_status(run / "status.json").branches["text"].status.step == 2


@pytest.mark.parametrize(
    ("error", "stage"), [(CopdError("no space left"), "failed"), (Interrupted("at step 3"), "stopped"), (None, "done")]
)
def test_note_says_how_a_run_has_ended(run: Path, clock: Clock, error: Exception | None, stage: str) -> None:
    def end() -> None:
        with StatusFile(run / "status.json", clock).told():
            if error is not None:
                raise error

    if error is None:
        end()
    else:
        with pytest.raises(type(error)):
            end()
    note = read_status(run / "status.json")
    assert (note.stage, note.reason) == (stage, str(error) if error else None)
    assert str(error or "done") in page(run, clock)


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with StatusFile(tmp_path / "file" / "status.json").told() as note:
        note.enter("training")


def test_what_is_no_run_is_said(run: Path, clock: Clock, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert "not started yet" in page(run, clock)
    with pytest.raises(ConfigError, match="not a run directory"):
        page(tmp_path_factory.mktemp("empty"), clock)
    (run / "status.json").write_text('{"stage": "sleeping"}')
    with pytest.raises(CopdError, match="cannot be read as a run's status"):
        page(run, clock)
