"""`copd status RUN`: where a run stands and how its branches do, from its files alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from copd_megatron.config import RunConfig
from copd_megatron.errors import ConfigError
from copd_megatron.observe.progress import PHASE_STYLES, STATE_STYLES, duration
from copd_megatron.observe.status_file import EVERY_SECONDS, BranchNote, Note, read_status
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder

GONE_SECONDS = 12 * EVERY_SECONDS
"""A conductor that has not renewed its note for so long while training is gone, or cannot write."""
SILENT_SECONDS, SILENT_STEPS = 60.0, 5.0
"""A branch that says nothing for longer than both is silent."""


def status_page(run: Path, clock: Callable[[], float] = time.time) -> RenderableType:
    """The page. Raises ConfigError for a folder that holds no run."""
    folder = RunFolder(run)
    if not folder.config_file.exists():
        raise ConfigError(f"{run}: not a run directory (no config.yaml)")
    config, note = folder.config(), read_status(folder.status)
    names = [branch.name for branch in config.trained]
    saved = RunCheckpoints(folder, names).newest()
    checkpoint = f"newest checkpoint: step {saved}" if saved else "no checkpoint yet"
    if note is None:
        return Text(f"{run}: not started yet; {checkpoint}")
    return Group(_head(run, note, clock()), _branches(config, names, note), Text(checkpoint))


def health(note: BranchNote, stage: str) -> str:
    """How a branch does: done, failed, ok, or silent since when."""
    if note.status.state in ("done", "failed"):
        return note.status.state
    if stage == "training" and note.age > max(SILENT_SECONDS, SILENT_STEPS * (note.step_seconds or 0.0)):
        return f"silent for {duration(note.age)}"
    return "ok"


def _head(run: Path, note: Note, now: float) -> RenderableType:
    where = note.host if note.job is None else f"{note.host}, Slurm job {note.job}"
    age = now - note.time
    text = Text(f"{run}: ", "bold").append(note.stage, STATE_STYLES.get(note.stage, ""))
    if note.stage == "training":
        left = "time left unknown" if note.seconds_left is None else f"{duration(note.seconds_left)} left"
        text.append(f", {left}")
    text.append(f" (on {where}; {duration(age)} ago)", "dim")
    if note.stage == "training" and age > GONE_SECONDS:
        text.append(
            f"\nno word from the conductor for {duration(age)}, by this machine's clock: it was killed, or its node is "
            "gone. The same command, or Slurm's requeue, continues from the newest checkpoint",
            "bold red",
        )
    if note.reason:
        text.append(f"\n{note.reason}")
    return text


def _branches(config: RunConfig, names: list[str], note: Note) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("branch", "cycle", "phase", "step", "of run", "s/step", "reward", "doing", "health"):
        table.add_column(title, no_wrap=True, justify="left" if title in ("branch", "phase", "doing") else "right")
    rhythm = config.rhythm
    steps = rhythm.cycles * (rhythm.explore_steps + rhythm.exchange_steps)
    for name in names:
        branch = note.branches.get(name)
        if branch is None:
            table.add_row(name, *["–"] * 6, "starting", "not heard of yet")
            continue
        status = branch.status
        condition = health(branch, note.stage)
        table.add_row(
            name,
            f"{status.cycle + 1}" + (f"/{rhythm.cycles}" if rhythm.kind == "fixed" else ""),
            Text(status.phase, PHASE_STYLES[status.phase]),
            f"{status.phase_step}/{status.phase_steps}",
            f"{status.step}/{steps}",
            "–" if branch.step_seconds is None else f"{branch.step_seconds:.2f}",
            "–" if status.reward is None else f"{status.reward:.3f}",
            Text(status.state, STATE_STYLES.get(status.state, "")),
            Text(condition, "" if condition in ("ok", "done") else "bold red"),
        )
    return table
