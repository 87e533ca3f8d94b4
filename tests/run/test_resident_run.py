"""Whole runs whose teachers are in the students' trainers."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tiny_run import TINY, Command, comparable

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CHANGES = {
    "teacher": {"where": "resident", "refresh": "phase"},
    "opd": {**TINY["opd"], "loss": "full_forward"},
    "branches": [TINY["branches"][0], {**TINY["branches"][1], "parallel": {"world": 2, "tp": 2}}],
    "rhythm": {**TINY["rhythm"], "exchange_steps": 4},
    "checkpoint": {"every_steps": 1, "asynchronous": False},
}
"""One branch alone on its process, the other divided; teachers that stay as they were when Phase II began."""


def test_killed_run_with_resident_teachers_ends_in_the_same_bits(tmp_path: Path, base: Path) -> None:
    runs = []
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        runs.append(Command(tmp_path / name, base, **CHANGES))
    undisturbed, killed = runs
    status, output = undisturbed.finish(timeout=800)
    assert status == 0, output

    process = killed.start()
    killed.wait_for(process, "text", lambda lines: any(line["step"] == 6 and "loss" in line for line in lines))
    os.killpg(process.pid, signal.SIGKILL)
    killed.finish(process)
    assert killed.checkpoints().steps()[-1] in (4, 5, 6), "in the middle of Phase II"
    status, output = killed.finish(timeout=800)
    assert status == 0, output

    assert killed.weights() == undisturbed.weights()
    for branch, peer in (("text", "image"), ("image", "text")):
        lines = undisturbed.lines(branch)
        assert comparable(killed.lines(branch)) == comparable(lines)
        lessons = [line for line in lines if line["phase"] == "exchange"]
        assert [line["step"] for line in lessons] == [4, 5, 6, 7]
        assert all(line["time/score"] > 0 for line in lessons)
        assert abs(lessons[0]["opd/kl"]) < 1e-6, "no branch has learned anything that the other has not"
        assert lessons[-1][f"symkl/{peer}"] > 0
