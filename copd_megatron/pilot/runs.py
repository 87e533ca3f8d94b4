"""Doing the runs of a pilot study that are not done yet: experts, their checkpoints as models, distillations."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from copd_megatron.compare.child_run import Job, do_runs, refuse_other_settings
from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError
from copd_megatron.pilot.settings import PilotSettings
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder

Reasons = dict[tuple[int, int], str]
"""Why there is no gain of a seed's student of so many updates."""


def check_descriptions(study: PilotSettings) -> None:
    """Raise ConfigError if a run is no valid description, or if what is there was run with other settings."""
    for seed in study.seeds:
        for config in (*_rlvr(study, seed), *(study.distillation(seed, step) for step in study.student.updates)):
            refuse_other_settings(config)


def do_missing(study: PilotSettings, console: Console, ranks: int = 1) -> Reasons:
    """Do what is missing; why students have no gain, for those that have none.

    A run that fails does not end the study; it is tried again the next time. Runs are side by side while they have at
    most `ranks` training processes together. Raises Interrupted when the user stops a run, CopdError where a finished
    run has lost a checkpoint.
    """
    reasons: Reasons = {}
    for seed in study.seeds:
        experts = [Job(f"expert {config.student}, seed {seed}", config) for config in _rlvr(study, seed)]
        failed = do_runs(experts, console, ranks)
        for expert in experts:
            if expert.what not in failed:
                write_models(study, seed, str(expert.config.student), console)
        students = {
            updates: Job(f"student of {updates} updates, seed {seed}", study.distillation(seed, updates))
            for updates in study.student.updates
        }
        if failed:
            what, reason = next(iter(failed.items()))
            reasons |= {(seed, updates): f"no {what}: {reason}" for updates in students}
            continue
        failed = do_runs(list(students.values()), console, ranks)
        reasons |= {(seed, updates): failed[job.what] for updates, job in students.items() if job.what in failed}
    return reasons


def write_models(study: PilotSettings, seed: int, capability: str, console: Console) -> None:
    """Make a Hugging Face folder of each checkpoint that the study needs. Raises CopdError if one is not there."""
    from copd_megatron.weights.convert import to_hf

    config = study.rlvr(seed, capability)
    checkpoints = RunCheckpoints(RunFolder(config.run_dir), [capability])
    for updates in study.curve(capability):
        model = study.model(seed, capability, updates)
        if (model / "config.json").exists():
            continue
        if wrong := checkpoints.problem(updates):
            raise CopdError(
                f"{config.run_dir}: the model after {updates} updates is needed, and its checkpoint cannot be used: "
                f"{wrong}. Remove the run, and start again to train it anew"
            )
        model.parent.mkdir(exist_ok=True)
        to_hf(checkpoints.part(capability, updates), model, base=Path(config.base))
        console.print(f"expert {capability}, seed {seed}: model after {updates} updates: {model}")


def _rlvr(study: PilotSettings, seed: int) -> tuple[RunConfig, RunConfig]:
    return study.rlvr(seed, study.teacher.capability), study.rlvr(seed, study.student.capability)
