"""One run of a larger undertaking, as a `copd train` of its own: whether it is done, doing it, why it could not be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from copd_megatron.config import RunConfig, save_config
from copd_megatron.errors import ConfigError, Interrupted
from copd_megatron.run_folder import RunFolder, mathematical_changes
from copd_megatron.run_lock import die_with_parent
from copd_megatron.signals import heeding


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


def do_run(config: RunConfig, what: str, console: Console) -> str | None:
    """Do `config`, or what is left of it; why it has failed, None if it has not. People know it as `what`.

    Its description and its log lie beside its folder. Raises Interrupted when the user stops it.
    """
    run_dir = Path(config.run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    description, log = run_dir.with_suffix(".yaml"), run_dir.with_suffix(".log")
    save_config(config, description)
    console.print(f"{what}: training (log: {log})")
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
        raise Interrupted(f"stopped in {what}; the same command goes on from there")
    if status == 0 and is_done(run_dir):
        return None
    last = _last_line(log) or f"exit status {status}"
    console.print(f"{what}: failed: {last}")
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
