"""Processes that are started and end together, and the gang that they make up."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from copd_megatron.supervision import processes
from copd_megatron.supervision.gang import Gang
from copd_megatron.supervision.processes import Processes, seats

SLEEP = "import time; time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEP}"


def start(log: Path, *programs: str) -> Processes:
    """A process for each program."""
    choose = "import os; exec(os.environ['PROGRAM'])"
    environments = [{**os.environ, "PROGRAM": program} for program in programs]
    return Processes([sys.executable, "-c", choose], environments, log)


def ended(started: Processes) -> int:
    """Their exit status; no look at them may take long."""
    deadline = time.monotonic() + 30
    while True:
        began = time.monotonic()
        status = started.poll()
        assert time.monotonic() - began < 1
        if status is not None:
            return status
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for(log: Path, words: str, times: int = 1) -> None:
    deadline = time.monotonic() + 30
    while log.read_text().count(words) < times:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("programs", [[""], ["", "import time; time.sleep(0.3)"]])
def test_status_is_zero_when_all_have_ended_well(tmp_path: Path, programs: Sequence[str]) -> None:
    started = start(tmp_path / "log.txt", *programs)
    assert ended(started) == 0
    started.kill()  # nobody is left
    assert (tmp_path / "log.txt").read_text() == ""


def test_the_others_are_ended_when_one_fails(tmp_path: Path) -> None:
    started = start(tmp_path / "log.txt", SLEEP, "import sys; sys.exit(3)", SLEEP)
    began = time.monotonic()
    assert ended(started) == 3
    assert started.poll() == 3
    assert time.monotonic() - began < 20
    assert (tmp_path / "log.txt").read_text() == "rank 1 has failed with exit status 3; all ranks are ended\n"


def test_the_others_are_asked_to_end_before_they_are_killed(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    heed = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(0)))"
    fail = f"import sys, time\nwhile 'ready' not in open({str(log)!r}).read(): time.sleep(0.02)\nsys.exit(2)"
    started = start(log, f"{heed}; print('ready', flush=True); {SLEEP}", fail)
    assert ended(started) == 2
    assert "asked" in log.read_text()


def test_one_that_a_signal_has_ended_is_named(tmp_path: Path) -> None:
    """Also when another, which has lost it, has failed by the time that somebody looks."""
    log = tmp_path / "log.txt"
    show = "import os; print(os.getpid(), flush=True); "
    started = start(log, f"{show} os._exit(1)", f"{show} os.kill(os.getpid(), 9)")
    wait_for(log, "\n", 2)
    for pid in log.read_text().split():
        os.waitid(os.P_PID, int(pid), os.WEXITED | os.WNOWAIT)
    assert ended(started) == -signal.SIGKILL
    assert "rank 1 was ended by 'Killed'" in log.read_text()


def test_one_that_does_not_heed_the_first_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_GRACE_SECONDS", 0.5)
    log = tmp_path / "log.txt"
    started = start(log, STUBBORN, SLEEP)
    wait_for(log, "deaf")
    assert started.poll() is None
    began = time.monotonic()
    started.kill()
    assert 0.5 <= time.monotonic() - began < 10
    fail = f"import sys, time\nwhile open({str(log)!r}).read().count('deaf') < 2: time.sleep(0.02)\nsys.exit(2)"
    started = start(log, STUBBORN, fail)
    began = time.monotonic()
    assert ended(started) == 2
    assert time.monotonic() - began >= 0.5


def test_what_they_have_started_ends_with_them(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    child = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
    started = start(log, f"{child} print('child', child.pid, flush=True); child.wait()")
    wait_for(log, "\n")
    pid = int(log.read_text().split()[1])
    started.kill()
    deadline = time.monotonic() + 20
    while _runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_gang_is_a_worker_for_each_rank_and_adds_to_its_log(tmp_path: Path) -> None:
    show = "import os, sys; print(os.environ['RANK'], os.environ['WORLD_SIZE'], *sys.argv[1:])"
    log = tmp_path / "text" / "log.txt"
    launcher, environments = [sys.executable, "-c", show], [{**os.environ, **seat} for seat in seats(2)]
    for _ in range(2):
        assert ended(Gang("text", launcher, ["--resume", "3"], "127.0.0.1", environments, log)) == 0
    lines = [line.split() for line in log.read_text().splitlines() if "--gang" in line]
    assert sorted(line[:2] for line in lines) == [["0", "2"]] * 2 + [["1", "2"]] * 2
    worker = ["-m", "copd_megatron.worker", "--resume", "3", "--rank0-host", "127.0.0.1", "--gang"]
    assert all(line[2:-1] == worker for line in lines)
    names = {line[-1] for line in lines}
    assert len(names) == 2, "one for each start"
    assert all(name.startswith("text/") for name in names)


def test_last_words_are_those_of_the_rank_that_srun_names(tmp_path: Path) -> None:
    log, ranks = tmp_path / "log.txt", tmp_path / "ranks"
    say = "import sys; sys.exit('srun: error: n2: task 1: Exited with exit code 1')"
    gang = Gang("text", [sys.executable, "-c", say], [], "10.0.0.1", [dict(os.environ)], log, ranks)
    (ranks / "rank_1.txt").write_text("the reason\n")
    assert ended(gang) == 1
    assert gang.last_words().endswith(f"--- end of {ranks}/rank_1.txt\nthe reason")
