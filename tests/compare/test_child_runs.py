"""Which runs go side by side, and what becomes of those that fail or are stopped; short processes in place of runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from copd_megatron.compare import child_run
from copd_megatron.compare.child_run import Job, _Running, do_runs
from copd_megatron.config import RunConfig
from copd_megatron.errors import Interrupted

PROCESS = """
import json, pathlib, signal, sys, time
run, seconds, status = pathlib.Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
signal.signal(signal.SIGINT, (lambda *_: None) if sys.argv[5] == "True" else (lambda *_: sys.exit(130)))
run.mkdir(parents=True, exist_ok=True)
(run / "began").write_text(str(time.monotonic()))
time.sleep(seconds)
if status == 0 and sys.argv[4] == "True":
    (run / "summary.json").write_text("{}")
    (run / "outcomes.json").write_text("{}")
elif status:
    print("error: no luck\\nmore about it")
(run / "ended").write_text(str(time.monotonic()))
sys.exit(status)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job whose run takes so long and ends with such a status."""
    how: dict[str, tuple[float, int, bool, bool]] = {}

    def start(job: Job, console: Console) -> _Running:
        log = job.run_dir.with_suffix(".log")
        with open(log, "ab") as output:
            command = [sys.executable, "-c", PROCESS, str(job.run_dir), *map(str, how[job.what])]
            return _Running(job, subprocess.Popen(command, stdout=output, start_new_session=True), log)

    def make(
        what: str,
        ranks: int = 1,
        seconds: float = 0.5,
        status: int = 0,
        result: bool = True,
        deaf: bool = False,
        experts: str | None = None,
    ) -> Job:
        how[what] = seconds, status, result, deaf
        branches = [{"name": f"b{number}", "data": {"mini": {"modality": "text"}}} for number in range(ranks)]
        topology = "mesh" if ranks > 1 else "none"
        content = {"base": "base", "branches": branches, "topology": topology, "run_dir": str(tmp_path / what)}
        return Job(what, RunConfig.model_validate(content), tmp_path / experts if experts else None)

    monkeypatch.setattr(child_run, "_start", start)
    return make


def spans(folder: Path) -> dict[str, tuple[float, float]]:
    """When each run began and ended."""
    return {
        run.name: (float((run / "began").read_text()), float((run / "ended").read_text()))
        for run in folder.iterdir()
        if run.is_dir()
    }


def together(first: tuple[float, float], second: tuple[float, float]) -> bool:
    return first[0] < second[1] and second[0] < first[1]


def test_ranks_are_counted(job):
    assert [job("one").ranks, job("two", ranks=2).ranks] == [1, 2]


def test_one_run_at_a_time_by_default(job, tmp_path):
    assert do_runs([job("a"), job("b")], Console(quiet=True)) == {}
    found = spans(tmp_path)
    assert found["a"][1] <= found["b"][0]


def test_runs_go_side_by_side_as_far_as_their_ranks_allow(job, tmp_path):
    jobs = [job("a", seconds=1.5), job("wide", ranks=2), job("b"), job("huge", ranks=3)]
    assert do_runs(jobs, Console(quiet=True), ranks=2) == {}
    found = spans(tmp_path)
    assert together(found["a"], found["b"]), "b fits beside a, though `wide` stands before it"
    for name in ("wide", "huge"):
        assert not any(together(found[name], other) for what, other in found.items() if what != name)


def test_who_starts_from_experts_waits_for_them(job, tmp_path):
    jobs = [job("experts"), job("student", experts="experts")]
    assert do_runs(jobs, Console(quiet=True), ranks=4) == {}
    found = spans(tmp_path)
    assert found["experts"][1] <= found["student"][0]


def test_a_failed_run_takes_only_its_students_with_it(job, tmp_path):
    jobs = [job("experts", status=1), job("student", experts="experts"), job("other")]
    assert do_runs(jobs, Console(quiet=True)) == {
        "experts": "error: no luck",
        "student": "its experts, experts, are not there",
    }
    assert set(spans(tmp_path)) == {"experts", "other"}


def test_a_run_that_ends_well_without_a_result_has_failed(job):
    assert do_runs([job("a", result=False)], Console(quiet=True)) == {"a": "exit status 0"}


def test_done_runs_are_not_done_again(job, tmp_path):
    do_runs([job("a")], Console(quiet=True))
    before = spans(tmp_path)
    do_runs([job("a")], Console(quiet=True))
    assert spans(tmp_path) == before


def test_stopping_starts_nothing_more_where_a_run_has_just_ended(job, tmp_path):
    def stop() -> None:
        while not (tmp_path / "a" / "began").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped in a"):
        do_runs([job("a", seconds=1.0, deaf=True), job("c")], Console(quiet=True))
    assert (tmp_path / "a" / "ended").exists()
    assert not (tmp_path / "c").exists()


def test_stopping_ends_all_that_run_and_starts_nothing_more(job, tmp_path):
    jobs = [job("a", seconds=60), job("b", seconds=60), job("c")]

    def stop() -> None:
        while not all((tmp_path / name / "began").exists() for name in "ab"):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted, match="stopped in a, b"):
        do_runs(jobs, Console(quiet=True), ranks=2)
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "a" / "ended").exists()
