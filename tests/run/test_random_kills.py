"""Killed anywhere, the run ends in the same bits: by itself, or by the same command again if it was the conductor.

Each seed draws who dies, in which step, and how long after its beginning; some wait for what shows on disk that a
checkpoint or a weight sync is under way. All are slow tests; chosen kills run always (test_train_command.py,
test_supervision.py).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tiny_run import Command, comparable

KINDS = ("checkpoint write", "Phase II", "weight sync", "commit", "Phase I")


def under_way(kind: str, run: Path, step: int) -> Callable[[], bool]:
    """Whether there is on disk what `kind` leaves while it lasts, at `step` or later."""
    parts = [run / "branches" / name / "checkpoints" for name in ("text", "image")]

    def writing() -> bool:
        names = [name for part in parts if part.is_dir() for name in os.listdir(part)]
        return any(name.endswith(".tmp") and int(name[6:13]) >= step for name in names if name.startswith(".step_"))

    def committing() -> bool:
        complete = {name for part in parts if part.is_dir() for name in os.listdir(part) if name.startswith("step_")}
        late = (name for name in complete if int(name[5:]) >= step)
        return any(not (run / "checkpoints" / f"{name}.json").exists() for name in late)

    def publishing() -> bool:
        folders = [run / "snapshots" / name for name in ("text", "image")]
        names = [name for folder in folders if folder.is_dir() for name in os.listdir(folder)]
        return any(name.startswith("version_") and int(name[8:15]) >= step for name in names)

    return {"checkpoint write": writing, "commit": committing, "weight sync": publishing}[kind]


def wait_for(condition: Callable[[], bool], process: object) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.001)


@pytest.mark.timeout(600)
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_run_ends_in_the_same_bits(command: Command, undisturbed: Command, seed: int) -> None:
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    victim = draw.choice(["text", "image", "conductor"])
    process = command.start()
    if kind.startswith("Phase"):
        done = draw.choice([0, 1, 2] if kind == "Phase I" else [3, 4, 5])  # updates before the one that is hit
        branch = draw.choice(["text", "image"])
        wait_for(lambda: done == 0 or any(line["step"] == done for line in command.lines(branch)), process)
        time.sleep(draw.uniform(0, 10.0 if done == 0 else 1.5))
    else:
        wait_for(under_way(kind, command.run, step=draw.choice([1, 2, 3, 4])), process)
        time.sleep(draw.choice([0, draw.uniform(0, 0.05)]))

    family = psutil.Process(process.pid).children(recursive=True)
    if victim == "conductor":
        process.kill()
    else:
        command.rank(victim).send_signal(signal.SIGKILL)
    status, output = command.finish(process)
    if victim == "conductor":
        assert status == -signal.SIGKILL, output
        assert not (command.run / "merged").exists(), "the run had already ended"
        status, output = command.finish()
    else:
        assert "all branches go on from step" in output, "the run had already ended"
    assert status == 0, output
    assert not [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]
    assert command.weights() == undisturbed.weights()
    for name in ("text", "image"):
        assert comparable(command.lines(name)) == comparable(undisturbed.lines(name))
    kept = undisturbed.checkpoints().steps()
    assert command.checkpoints().steps() == kept
    for name in ("text", "image"):
        there = sorted(path.name for path in (command.run / "branches" / name / "checkpoints").iterdir())
        assert there == [f"step_{step:07d}" for step in kept]
