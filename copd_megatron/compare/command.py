"""`copd compare`: do the runs that are missing, then write the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from copd_megatron.compare.child_run import is_done
from copd_megatron.compare.pages import write_pages
from copd_megatron.compare.results import gather
from copd_megatron.compare.runs import check_descriptions, do_missing
from copd_megatron.compare.settings import Comparison
from copd_megatron.config import load_config
from copd_megatron.errors import CopdError, Interrupted


def compare(
    config: Path,
    overrides: Sequence[str],
    console: Console,
    only: tuple[str, ...] = (),
    train: bool = True,
    ranks: int = 1,
) -> None:
    """Raises CopdError, after the table is written, if a run has failed or rows are not at the same budget."""
    comparison = load_config(config, overrides, Comparison)
    check_descriptions(comparison)
    stopped: Interrupted | None = None
    reasons: dict[tuple[str, int], str] = {}
    if train:
        try:
            reasons = do_missing(comparison, console, only, ranks)
        except Interrupted as error:
            stopped = error
    if not any(is_done(comparison.run_dir(arm.name, seed)) for arm in comparison.arms for seed in comparison.seeds):
        raise stopped or CopdError(f"{comparison.out}: no run of this comparison has a result; see the logs in runs/")
    rows = gather(comparison, reasons)
    files = write_pages(comparison, rows)
    console.print(f"comparison: {files['html']}, {files['md']}, {files['json']}")
    if stopped is not None:
        raise stopped
    wrong = [f"{arm}, seed {seed}: {reason}" for (arm, seed), reason in reasons.items() if not only or arm in only]
    wrong += [f"not at equal budget: {row.budget}" for row in rows if row.budget]
    if wrong:
        raise CopdError("the comparison is not whole:\n  " + "\n  ".join(wrong))
