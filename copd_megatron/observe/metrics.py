"""The numbers of a run: one JSON object per line, and the same as TensorBoard scalars.

Every line has `branch, cycle, phase, step, time`. `step` is the number of updates finished, so the line of a run's
first update has step 1 and a measurement before it step 0; `cycle` counts from 0; `phase` is "explore" (Phase I),
"exchange" (Phase II), "probe" (drift between branches), "switch" (the end of a steered phase) or "eval"; `time` is
seconds since 1970.

Metric keys:

    reward/mean reward/std            reward of the branch's own rollouts
    rollout/length rollout/truncated  mean response tokens; share of responses that were cut
    opd/kl opd/delta                  distillation: estimated KL to the teachers, mean log-ratio δ
    overlap/T symkl/T support/T kl_teacher/T
                                      drift of this student from teacher T (docs/method.md, "Overlap")
    kl_to_base                        KL(π_0 ‖ π_k) on the branch's own prompts
    heldout/C                         reward on validation prompts of capability C, one rollout each
    ended reason length low high gain gain_error
                                      of a switch: the phase that ended, why, its updates, the bounds in force, and what
                                      a Phase II absorbed per update (steering/absorption.py)
    entropy grad_norm lr mismatch/kl  training health; engine against trainer
    tokens_per_second mfu             speed
    memory_gib rss_gib gpu/*          observe/gpu.py
    time/*                            observe/timeline.py, seconds
    count/*                           events of this step, which add up over a run: count/rollouts,
                                      count/rollout_tokens (own and cross, sampled tokens), count/groups,
                                      count/zero_variance, count/unparsable, count/truncated, count/skipped,
                                      count/refused
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

from copd_megatron.errors import CopdError
from copd_megatron.files import write_atomic
from copd_megatron.observe.jsonl import Line, LineWriter, encode, read_lines

METRICS_FILE = "metrics.jsonl"
OWN_KEYS = ("branch", "cycle", "phase", "step", "time", "nonfinite")


class MetricsWriter:
    """Writes one branch's metrics to `path` and, where `tensorboard_dir` is given, its numbers to TensorBoard.

    Numbers may be Python, NumPy or zero-dimensional torch scalars. A number that is not finite becomes null, and the
    line's `nonfinite` says what it was: {"grad_norm": "inf"}. Floats keep six significant digits.
    """

    def __init__(
        self, path: str | os.PathLike[str], branch: str, tensorboard_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self._branch = branch
        self._lines = LineWriter(path)
        self._tensorboard_dir = tensorboard_dir
        self._tensorboard: _Scalars | None = None
        self._purge_step: int | None = None
        self._resumed: set[tuple[int, str]] = set()

    def truncate_after(self, step: int) -> None:
        """Call on resume, before the first `write`: lines later than the checkpoint's `step` go, whole or not at all.

        A line of that very step which is still there (a probe between the checkpoint and the crash) is not written
        again, so a resumed run ends with the same lines as one that was never stopped.
        """
        kept = self._lines.keep(lambda line: line["step"] <= step)
        self._resumed = {(line["step"], line["phase"]) for line in kept}
        self._purge_step = step + 1

    def write(self, step: int, cycle: int, phase: str, **values: Any) -> None:
        """Write one line. Raises ValueError for a value that is not a scalar or for one of the line's own keys."""
        if (step, phase) in self._resumed:
            return
        line: Line = {"branch": self._branch, "cycle": cycle, "phase": phase, "step": step, "time": _now()}
        nonfinite = {}
        for key, value in values.items():
            if key in OWN_KEYS:
                raise ValueError(f"metric {key!r}: this name belongs to the line itself; choose another")
            scalar = _scalar(key, value)
            if isinstance(scalar, float) and not math.isfinite(scalar):
                nonfinite[key] = str(scalar)
                scalar = None
            line[key] = scalar
        if nonfinite:
            line["nonfinite"] = nonfinite
        self._lines.append(line)
        self._write_scalars(step, line)

    def sync(self) -> None:
        """Make all lines survive a power cut. Call before a checkpoint is declared complete."""
        self._lines.sync()

    def close(self) -> None:
        """Flush and close both outputs."""
        self._lines.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _write_scalars(self, step: int, line: Line) -> None:
        if self._tensorboard_dir is None:
            return
        if self._tensorboard is None:
            self._tensorboard = _open_tensorboard(self._tensorboard_dir, self._purge_step)
        for key, value in line.items():
            if key not in OWN_KEYS and isinstance(value, int | float):
                self._tensorboard.add_scalar(key, float(value), step)
        self._tensorboard.flush()


def metrics_path(run_dir: str | os.PathLike[str], branch: str) -> Path:
    """Where a branch writes its metrics."""
    return Path(run_dir) / "branches" / branch / METRICS_FILE


def read_metrics(run_dir: str | os.PathLike[str]) -> list[Line]:
    """All branches' lines, ordered by step and then branch; also of a run that is still being written.

    Taken from `branches/*/metrics.jsonl`, or from the merged `metrics.jsonl` where only that was kept. Raises
    CopdError for a line that is not a metrics line.
    """
    run = Path(run_dir)
    files = sorted(run.glob(f"branches/*/{METRICS_FILE}")) or [run / METRICS_FILE]
    lines = []
    for path in files:
        for number, line in enumerate(read_lines(path), start=1):
            missing = [key for key in ("branch", "cycle", "phase", "step") if key not in line]
            if missing:
                raise CopdError(f"{path}, line {number}: expected the keys {', '.join(missing)}, found {sorted(line)}")
            lines.append(line)
    return sorted(lines, key=lambda line: (line["step"], line["branch"]))


def merge_metrics(run_dir: str | os.PathLike[str]) -> Path:
    """Write `run_dir/metrics.jsonl`, all branches in one file, whole or not at all; return its path."""
    target = Path(run_dir) / METRICS_FILE
    write_atomic(target, "".join(map(encode, read_metrics(run_dir))))
    return target


class _Scalars(Protocol):
    """The part of TensorBoard's SummaryWriter that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


def _open_tensorboard(folder: str | os.PathLike[str], purge_step: int | None) -> _Scalars:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise CopdError(
            f"TensorBoard output needs the package tensorboard ({error}); install it or set log.tensorboard=false"
        ) from error
    writer: _Scalars = SummaryWriter(str(folder), purge_step=purge_step)
    return writer


def _now() -> float:
    return round(time.time(), 3)


def _scalar(key: str, value: Any) -> float | int | str | bool | None:
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"metric {key!r}: expected a scalar, found {type(value).__name__} ({error})") from error
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if value is None or isinstance(value, int | str):
        return value
    raise ValueError(f"metric {key!r}: expected a number, a string or None, found {type(value).__name__}")
