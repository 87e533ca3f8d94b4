"""Doing the runs of a comparison that are not done yet, and saying what became of each."""

from __future__ import annotations

from rich.console import Console

from copd_megatron.compare.child_run import Job, do_runs, is_done, refuse_other_settings
from copd_megatron.compare.settings import Comparison
from copd_megatron.errors import ConfigError


def check_descriptions(comparison: Comparison) -> None:
    """Raise ConfigError if an arm is no valid run, or if what is there was run with other settings."""
    for arm in comparison.arms:
        for seed in comparison.seeds:
            refuse_other_settings(comparison.run(arm, seed))


def do_missing(
    comparison: Comparison, console: Console, only: tuple[str, ...] = (), ranks: int = 1
) -> dict[tuple[str, int], str]:
    """Do what is missing of the arms `only` (none: all); why an (arm, seed) has no result, for those that have none.

    A run that fails does not end the comparison; it is tried again the next time. Runs are side by side while they have
    at most `ranks` training processes together. Raises Interrupted when the user stops a run, ConfigError for an arm
    that does not exist.
    """
    names = [arm.name for arm in comparison.arms]
    if unknown := [name for name in only if name not in names]:
        raise ConfigError(f"--only {', '.join(unknown)}: no such arm; there are {', '.join(names)}")
    jobs: dict[tuple[str, int], Job] = {}
    reasons: dict[tuple[str, int], str] = {}
    for seed in comparison.seeds:
        for arm in comparison.arms:
            if is_done(comparison.run_dir(arm.name, seed)):
                continue
            if only and arm.name not in only:
                reasons[arm.name, seed] = "not asked for yet"
                continue
            experts = comparison.run_dir(arm.experts, seed) if arm.experts is not None else None
            jobs[arm.name, seed] = Job(f"{arm.name}, seed {seed}", comparison.run(arm, seed), experts)
    failed = do_runs(list(jobs.values()), console, ranks)
    return reasons | {key: failed[job.what] for key, job in jobs.items() if job.what in failed}
