"""Doing the runs of a comparison that are not done yet, one after the other, and saying what became of each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from copd_megatron.compare.settings import Arm, Comparison
from copd_megatron.config import save_config
from copd_megatron.errors import ConfigError, Interrupted
from copd_megatron.run_folder import RunFolder, mathematical_changes
from copd_megatron.run_lock import die_with_parent
from copd_megatron.signals import heeding


def is_done(run_dir: Path) -> bool:
    """Whether a run has ended and been evaluated."""
    folder = RunFolder(run_dir)
    return folder.summary.exists() and folder.outcomes.exists()


def check_descriptions(comparison: Comparison) -> None:
    """Raise ConfigError if an arm is no valid run, or if what is there was run with other settings."""
    for arm in comparison.arms:
        for seed in comparison.seeds:
            config = comparison.run(arm, seed)
            folder = RunFolder(config.run_dir)
            if not folder.config_file.exists():
                continue
            old, new = folder.config().model_dump(mode="json"), config.model_dump(mode="json")
            if changed := mathematical_changes(old, new):
                raise ConfigError(
                    f"{folder.path} was run with other settings (its value -> the one given): {'; '.join(changed)}. "
                    "Remove it to run it again, or give another `out`"
                )


def do_missing(comparison: Comparison, console: Console, only: tuple[str, ...] = ()) -> dict[tuple[str, int], str]:
    """Do what is missing of the arms `only` (none: all); why an (arm, seed) has no result, for those that have none.

    A run that fails does not end the comparison; it is tried again the next time. Raises Interrupted when the user
    stops a run, ConfigError for an arm that does not exist.
    """
    names = [arm.name for arm in comparison.arms]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"--only {', '.join(unknown)}: no such arm; there are {', '.join(names)}")
    reasons: dict[tuple[str, int], str] = {}
    for seed in comparison.seeds:
        for arm in comparison.arms:
            run_dir = comparison.run_dir(arm.name, seed)
            if is_done(run_dir):
                continue
            if only and arm.name not in only:
                reasons[arm.name, seed] = "not asked for yet"
            elif arm.experts is not None and not is_done(comparison.run_dir(arm.experts, seed)):
                reasons[arm.name, seed] = f"its experts, arm {arm.experts}, are not there"
            elif (reason := _do(comparison, arm, seed, console)) is not None:
                reasons[arm.name, seed] = reason
    return reasons


def _do(comparison: Comparison, arm: Arm, seed: int, console: Console) -> str | None:
    """Run `copd train`; why it has failed, None if it has not."""
    run_dir = comparison.run_dir(arm.name, seed)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    description, log = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".log")
    save_config(comparison.run(arm, seed), description)
    console.print(f"{arm.name}, seed {seed}: training (log: {log})")
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "copd_megatron.cli", "train", str(description)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C in the terminal reaches it once, through us
            preexec_fn=die_with_parent,
        )
        with _passing_on_signals(process) as stopped:
            status = process.wait()
    if stopped or status == Interrupted.exit_code:
        raise Interrupted(f"stopped in {arm.name}, seed {seed}; the same command goes on from there")
    if status == 0 and is_done(run_dir):
        return None
    last = _last_line(log) or f"exit status {status}"
    console.print(f"{arm.name}, seed {seed}: failed: {last}")
    return last


@contextmanager
def _passing_on_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Hand the wish to stop on to the run, which saves and ends; the signals that came."""
    came: list[int] = []

    def hand_on(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        process.send_signal(signum)

    with heeding(hand_on):
        yield came


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # The command's reason may go on over several lines, the first of which says most.
    return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")[:300]
