"""Runs of a larger undertaking, each a `copd train` of its own: doing those that are missing, why some failed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console

from copd_megatron.config import RunConfig, save_config
from copd_megatron.errors import ConfigError, Interrupted
from copd_megatron.run_folder import RunFolder, mathematical_changes
from copd_megatron.supervision.run_lock import die_with_parent
from copd_megatron.supervision.signals import heeding

_LOOK_SECONDS = 0.1


def is_done(run_dir: Path) -> bool:
    """Whether a run has ended and been evaluated."""
    folder = RunFolder(run_dir)
    return folder.summary.exists() and folder.outcomes.exists()


def refuse_other_settings(config: RunConfig) -> None:
    """Raise ConfigError if what is in the run's folder was run with other settings."""
    folder = RunFolder(config.run_dir)
    if not folder.config_file.exists():
        return
    old, new = folder.config().model_dump(mode="json"), config.model_dump(mode="json")
    if changed := mathematical_changes(old, new):
        raise ConfigError(
            f"{folder.path} was run with other settings (its value -> the one given): {'; '.join(changed)}. "
            "Remove it to run it again, or give another `out`"
        )


@dataclass(frozen=True)
class Job:
    """A run that people know as `what`; `experts` is the folder of the run that has to be done before it."""

    what: str
    config: RunConfig
    experts: Path | None = None

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def ranks(self) -> int:
        """Training processes that it has at once."""
        return sum(branch.parallel.world for branch in self.config.trained)


def do_runs(jobs: Sequence[Job], console: Console, ranks: int = 1) -> dict[str, str]:
    """Do what is not done of the jobs; why some have no result, by `what`.

    Several run beside each other as long as they have at most `ranks` training processes together; one that has more
    runs alone. Those that are ready and fit start in the given order. A job whose experts are not there and do not come
    any more is left out. Raises Interrupted when the user stops them, after all that ran have saved and ended.
    """
    waiting = [job for job in jobs if not is_done(job.run_dir)]
    running: list[_Running] = []
    reasons: dict[str, str] = {}
    with _handing_on_signals(running) as stopped:
        while running or (waiting and not stopped):
            for job in () if stopped else tuple(waiting):
                if job.experts is not None and not is_done(job.experts):
                    if job.experts not in {other.run_dir for other in (*waiting, *(one.job for one in running))}:
                        waiting.remove(job)
                        reasons[job.what] = f"its experts, {job.experts.name}, are not there"
                elif not running or sum(one.job.ranks for one in running) + job.ranks <= ranks:
                    waiting.remove(job)
                    running.append(_start(job, console))
            time.sleep(_LOOK_SECONDS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                if one.process.returncode == Interrupted.exit_code:
                    stopped.append(one.job.what)
                elif one.process.returncode or not is_done(one.job.run_dir):
                    reasons[one.job.what] = _last_line(one.log) or f"exit status {one.process.returncode}"
                    console.print(f"{one.job.what}: failed: {reasons[one.job.what]}")
    if stopped:
        raise Interrupted(f"stopped in {', '.join(dict.fromkeys(stopped))}; the same command goes on from there")
    return reasons


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path


def _start(job: Job, console: Console) -> _Running:
    """Start a job. Its description and its log lie beside its folder."""
    job.run_dir.parent.mkdir(parents=True, exist_ok=True)
    description, log = job.run_dir.with_suffix(".yaml"), job.run_dir.with_suffix(".log")
    save_config(job.config, description)
    console.print(f"{job.what}: training (log: {log})")
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "copd_megatron.cli", "train", str(description)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal reaches it once, through us
            preexec_fn=die_with_parent,
        )
    return _Running(job, process, log)


@contextmanager
def _handing_on_signals(running: Sequence[_Running]) -> Iterator[list[str]]:
    """Hand the wish to stop on to all that runs, which saves and ends; where it came, by what people know it as."""
    stopped: list[str] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        stopped.extend([one.job.what for one in running] or ["between two runs"])
        for one in running:
            one.process.send_signal(signum)

    with heeding(hand_on):
        yield stopped


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # The command's reason may go on over several lines, the first of which says most.
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")[:300]
