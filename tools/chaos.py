"""Random faults in real runs of the real command: does every one end as if nothing had happened, or stop in order?

    PYTHONPATH=tests/run python tools/chaos.py --seed 0 --faults 20 --json FILE --doc docs/reliability.md

Each fault hits a tiny two-branch run (tests/run/tiny_run.py; one branch has two ranks) at a random moment. Then

- the run ends by itself with the bits of an undisturbed run (with SGLang servers: its rewards and lengths), or
- it stops with a message, and the same command, once the cause is gone, ends so.

Anything else, or a run that is still there after ten minutes, makes this exit with status 1. Needs root for the full
disk (a small tmpfs), the reset connection (`ss -K`) and the partition (a network namespace); without it these are not
drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import chaos_faults as faults
import doc_table
from tiny_run import TINY, Command, comparable

from copd_megatron.data.mini.model import build
from copd_megatron.files import write_atomic
from copd_megatron.observe.events import read_events

NAMES = ("text", "image")
LONGEST = 600.0
UPDATES = 6
DISK_MEBIBYTES = 400
CHANGES: dict[str, Any] = {
    "branches": [TINY["branches"][0], {**TINY["branches"][1], "parallel": {"world": 2}}],
    "supervision": {"heartbeat_seconds": 30, "stall_seconds": 240},
    "teacher": {"wait_seconds": 200},
}
SERVERS: dict[str, Any] = {
    "rollout": {"engine": "sglang", "max_new_tokens": 6, "sglang": {"hang_seconds": 20}},
    "log": {**TINY["log"], "kl_to_base": False},
}
"""With servers: no third one for the base."""
NEEDS_ROOT = (faults.fill_disk, faults.drop_connection, faults.partition)


@dataclass(frozen=True)
class Result:
    """What a fault did."""

    fault: str
    moment: str
    result: str
    good: bool
    said: str
    seconds: float


class Hang(Exception):
    """A run that did not end."""


def main() -> int:
    """Exit status 1 if a fault did harm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order, moments and victims")
    parser.add_argument("--faults", type=int, default=20, help="how many")
    parser.add_argument("--only", help="name of the only fault, e.g. stop_rank")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--doc", type=Path, help="put the table into this page")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="chaos_") as folder:
        results = list(run_all(Path(folder), arguments.seed, arguments.faults, arguments.only))
    if arguments.json:
        content = {"date": date.today().isoformat(), "seed": arguments.seed, "cpus": os.cpu_count()}
        content["results"] = [asdict(result) for result in results]
        write_atomic(arguments.json, json.dumps(content, indent=1) + "\n")
    if arguments.doc:
        doc_table.put(arguments.doc, "chaos", table(results))
    return int(not all(result.good for result in results))


def run_all(folder: Path, seed: int, count: int, only: str | None) -> Iterator[Result]:
    """Every fault's result, printed as it comes."""
    draw = random.Random(seed)
    base = folder / "base"
    build(base, seed=0)
    kinds = [kind for kind in (*faults.ON_EMBEDDED, *faults.ON_SERVERS) if only in (None, kind.__name__)]
    if os.geteuid() != 0:
        kinds = [kind for kind in kinds if kind not in NEEDS_ROOT]
    if not kinds:
        raise SystemExit(f"--only {only}: no such fault (or it needs root)")
    plan = [kinds[number % len(kinds)] for number in range(count)]
    draw.shuffle(plan)
    undisturbed: dict[bool, Command] = {}
    for number, fault in enumerate(plan):
        served = fault in faults.ON_SERVERS
        if served not in undisturbed:
            undisturbed[served] = _command(made(folder / f"undisturbed_{served}"), base, served)
            status, output = undisturbed[served].finish(timeout=LONGEST)
            if status:
                raise SystemExit(f"the undisturbed run has failed:\n{output}")
        place = made(folder / f"run_{number}")
        with _disk(place, small=fault is faults.fill_disk):
            result = _try(fault, _command(place, base, served), undisturbed[served], draw)
        print(f"{number + 1}/{count}  {result.fault} | {result.moment} | {result.result} | {result.said}", flush=True)
        shutil.rmtree(place)
        yield result


def made(folder: Path) -> Path:
    """The folder, new."""
    folder.mkdir()
    return folder


def _command(folder: Path, base: Path, served: bool) -> Command:
    return Command(folder, base, **CHANGES, **(SERVERS if served else {}))


@contextmanager
def _disk(place: Path, small: bool) -> Iterator[None]:
    if not small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MEBIBYTES}m", "chaos", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _try(fault: faults.Fault, command: Command, undisturbed: Command, draw: random.Random) -> Result:
    begun = time.monotonic()
    private = fault is faults.partition
    within = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh") if private else ()
    process = command.start(within=within)
    done, wait = draw.randrange(0, UPDATES), draw.uniform(0, 1.5)
    wait = draw.uniform(0, 15) if done == 0 else wait
    moment = f"{wait:.1f} s after " + (f"update {done}" if done else "the start")

    def result(text: str, good: bool, said: str) -> Result:
        name = (fault.__doc__ or "").split(".")[0]
        said = said.replace(f"{command.run.parent.parent}/", "")  # where the runs are is of no interest
        return Result(name, moment, text, good, said[:200], time.monotonic() - begun)

    try:
        _reach(command, process, done)
        time.sleep(wait)
        hit = _hit(fault, faults.Target(command, process, draw))
        status, output = _finish(command, process)
        if not hit:
            return result("the run had already ended", _same(command, undisturbed), "")
        said = _cause(output) if status > 0 else _recovery(command)  # a killed conductor says nothing
        if status == 0:
            same = _same(command, undisturbed)
            return result("went on by itself, same result" if same else "OTHER RESULT", same, said)
        (command.run.parent / "ballast").unlink(missing_ok=True)
        advice = re.search(r"--resume-from (\d+)", output)
        status, output = _finish(
            command, command.start(*(["--resume-from", advice[1]] if advice else []), within=within)
        )
        if status:
            return result("stopped; COULD NOT GO ON", False, f"{said}; then: {_cause(output)}")
        same = _same(command, undisturbed)
        return result("stopped; the command again: same result" if same else "OTHER RESULT", same, said)
    except Hang:
        return result("HANG", False, "")
    finally:
        _clear_away(process)


def _reach(command: Command, process: subprocess.Popen[str], updates: int) -> None:
    deadline = time.monotonic() + LONGEST
    while updates and not any(line["step"] == updates for line in command.lines("text")):
        if process.poll() is not None:
            return
        if time.monotonic() > deadline:
            raise Hang
        time.sleep(0.02)
    while not updates and not list(command.run.glob("branches/*/log.txt")):
        time.sleep(0.02)


def _hit(fault: faults.Fault, target: faults.Target) -> bool:
    """Whether there still was something to hit."""
    deadline = time.monotonic() + 60
    while target.conductor.poll() is None and not (target.command.run / "merged").exists():
        try:
            fault(target)
            return True
        except (ProcessLookupError, IndexError, FileNotFoundError):  # not yet, or just now no more
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    return False


def _finish(command: Command, process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        return command.finish(process, timeout=LONGEST)
    except subprocess.TimeoutExpired as error:
        raise Hang from error


def _same(command: Command, undisturbed: Command) -> bool:
    if "sglang" in command.config.read_text():  # whose rounding depends on what else is in a batch
        keys = ("reward/mean", "rollout/length")
        return all(
            [line.get(key) for line in command.lines(name)] == [line.get(key) for line in undisturbed.lines(name)]
            for name in NAMES
            for key in keys
        )
    return command.weights() == undisturbed.weights() and all(
        comparable(command.lines(name)) == comparable(undisturbed.lines(name)) for name in NAMES
    )


def _recovery(command: Command) -> str:
    told = [event for event in read_events(command.run) if event["kind"] in ("warning", "failure", "recovery")]
    return "; ".join(dict.fromkeys(event["text"].split("\n")[0] for event in told[:2]))


def _cause(output: str) -> str:
    """The line that says why: the last that is not advice."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search(r"No space|differs|damaged|bytes|failed|crashed|died|gone|silent", line)
    ]
    return (telling or lines or ["killed"])[-1][:200]


def _clear_away(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    lines = ["| fault | moment | result | what the run said | seconds |", "|---|---|---|---|---:|"]
    for result in results:
        said = result.said.replace("|", "/")
        lines.append(f"| {result.fault} | {result.moment} | {result.result} | {said} | {result.seconds:.0f} |")
    return "\n".join([f"{date.today().isoformat()}, {os.cpu_count()} CPU cores:", "", *lines, ""]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
