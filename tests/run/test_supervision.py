"""Runs in which something fails that does not simply die."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import Command, comparable

from copd_megatron.config import RunConfig, load_config
from copd_megatron.observe.events import read_events
from copd_megatron.run_folder import RunFolder


def events(command: Command, kind: str) -> list[str]:
    return [event["text"] for event in read_events(command.run) if event["kind"] == kind]


def assert_as_undisturbed(command: Command, undisturbed: Command) -> None:
    assert command.weights() == undisturbed.weights()
    for name in ("text", "image"):
        assert comparable(command.lines(name)) == comparable(undisturbed.lines(name))


def switchboard(command: Command) -> psutil.Process:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "copd_megatron.supervision.switchboard" in words and str(command.run) in words:
            return process
    raise AssertionError("no switchboard is running")


def test_a_stopped_rank_is_replaced(tmp_path: Path, base: Path, undisturbed: Command) -> None:
    command = Command(tmp_path, base, supervision={"heartbeat_seconds": 20})
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 2 for line in lines))
    command.rank("text").send_signal(signal.SIGSTOP)
    status, output = command.finish(process)
    assert status == 0, output
    assert any("no sign of life from rank 0" in text for text in events(command, "failure"))
    assert_as_undisturbed(command, undisturbed)


def test_branches_whose_conductor_is_killed_save_together_and_end(command: Command, undisturbed: Command) -> None:
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 1 for line in lines))
    ranks = [command.rank(name) for name in ("text", "image")]
    store = switchboard(command)
    process.kill()
    assert not psutil.wait_procs([*ranks, store], timeout=120)[1]
    newest = command.checkpoints().newest()
    assert newest >= 1
    assert command.checkpoints().problem(newest, contents=True) is None
    assert f"all branches save step {newest} and end" in events(command, "failure")[0]
    status, output = command.finish()
    assert status == 0, output
    assert f"continuing from step {newest}" in output
    assert_as_undisturbed(command, undisturbed)


@pytest.mark.slow
def test_a_branch_that_is_alive_but_does_nothing_shows_where_it_stands(tmp_path: Path, base: Path) -> None:
    """Opening a pipe that nobody writes to lasts for ever."""
    command = Command(tmp_path, base, supervision={"stall_seconds": 40, "max_restarts": 0})
    folder = RunFolder(command.run)
    folder.open(load_config(command.config, [], RunConfig))
    folder.branch("text").mkdir(parents=True)
    os.mkfifo(folder.branch("text") / "metrics.jsonl")
    status, output = command.finish()
    assert status == 1
    assert "alive, but without progress for 40 s" in output
    log = (folder.branch("text") / "log.txt").read_text()
    assert "what it is doing" in log
    assert "jsonl.py" in log  # where it waits
    (folder.branch("text") / "metrics.jsonl").unlink()
    status, output = command.finish()
    assert status == 0, output


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_what_branches_talk_through_is_replaced(command: Command, undisturbed: Command, sent: signal.Signals) -> None:
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 2 for line in lines))
    switchboard(command).send_signal(sent)
    status, output = command.finish(process)
    assert status == 0, output
    assert any("that branches talk through is gone" in text for text in events(command, "failure"))
    assert_as_undisturbed(command, undisturbed)


@pytest.mark.slow
def test_a_conductor_that_is_stopped_for_a_while_does_no_harm(tmp_path: Path, base: Path, undisturbed: Command) -> None:
    command = Command(tmp_path, base, supervision={"heartbeat_seconds": 20})
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 1 for line in lines))
    process.send_signal(signal.SIGSTOP)
    time.sleep(45)
    process.send_signal(signal.SIGCONT)
    status, output = command.finish(process)
    assert status == 0, output
    assert events(command, "failure") == []
    assert_as_undisturbed(command, undisturbed)
