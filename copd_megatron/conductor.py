"""`copd train`: starts one gang per branch, watches, shows progress, merges, evaluates, reports.

The conductor holds no model and takes no part in training; if it is started again on the same run directory it goes on
from the newest checkpoint of all branches together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from copd_megatron.budget import write_summary
from copd_megatron.cluster.site import open_site
from copd_megatron.config import RunConfig
from copd_megatron.errors import ConfigError
from copd_megatron.evaluate.final import evaluate_run
from copd_megatron.observe.environment import record_environment
from copd_megatron.observe.metrics import merge_metrics
from copd_megatron.observe.pace import RunPlan
from copd_megatron.observe.progress import Progress
from copd_megatron.observe.report import build_report
from copd_megatron.observe.status_file import StatusFile
from copd_megatron.rollout.sglang.fleet import Fleet
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder
from copd_megatron.supervision.run_lock import conductor_lock
from copd_megatron.supervision.supervisor import Supervisor
from copd_megatron.topology import untaught
from copd_megatron.weights.merge.folders import merge_folders

log = logging.getLogger(__name__)


def run(config: RunConfig, console: Console, resume_from: int | None = None) -> None:
    """Do whatever of the run is not done yet. Raises CopdError with the reason if it cannot be finished.

    It goes on from the newest checkpoint, or from that of step `resume_from`, whose successors are forgotten then.
    """
    for name, expert in config.experts.items():
        if not (Path(expert) / "config.json").is_file():
            raise ConfigError(f"experts.{name}: {expert} is not a Hugging Face folder (no config.json)")
    if not (Path(config.base) / "config.json").is_file():
        raise ConfigError(
            f"base: {config.base} is not a Hugging Face folder (no config.json); the mini configs' base is made by "
            f"`python tools/mini_base.py --seed {config.seed}`"
        )
    if config.rollout.engine == "sglang" and not config.rollout.sglang.urls and find_spec("sglang") is None:
        raise ConfigError(
            "rollout.engine: sglang is not installed: pip install 'copd-megatron[serve]' on a GPU host, `make env` on "
            "a CPU; or give servers that are already there (rollout.sglang.urls)"
        )
    folder = RunFolder(config.run_dir)
    changes = folder.open(config)
    names = [branch.name for branch in config.trained]
    with conductor_lock(folder.path), _log_file(folder.log), StatusFile(folder.status).told() as note:
        record_environment(folder.path)
        for name in untaught(config.edges, names):
            log.info("branch %s has no teacher: its Phase II is reinforcement learning alone", name)
            console.print(f"branch {name} has no teacher: its Phase II is reinforcement learning alone")
        finished = all((folder.final(name) / "config.json").exists() for name in names)
        if finished and resume_from is not None:
            raise ConfigError(
                f"--resume-from {resume_from}: {folder.path} is trained to the end. To train its last part again, "
                "remove branches/*/final, merged and evaluation.json there"
            )
        if not finished:
            start = _starting_point(config, folder, names, resume_from)
            if changes:
                folder.adopt(config)
                console.print("continuing with other settings (before -> now): " + "; ".join(changes))
            note.enter("training")
            _train(config, folder, names, start, console, note)
        if len(names) > 1 and not folder.merged.exists():
            note.enter("merging")
            merge_folders(
                [folder.final(name) for name in names],
                out=folder.merged,
                base=Path(config.base),
                recipe=config.merge.recipe(names, config.seed),
                console=console,
            )
            console.print(f"merged model: {folder.merged}")
        if not folder.evaluation.exists():
            note.enter("evaluating")
            evaluate_run(config, folder, console)
        merge_metrics(folder.path)
        write_summary(config, folder)
        console.print(f"report: {build_report(folder.path)}")


def _starting_point(config: RunConfig, folder: RunFolder, names: list[str], resume_from: int | None) -> int:
    """The step to go on from, with everything cleared away that does not lead up to it.

    A damaged checkpoint is refused, not passed over: to lose what came after an older one is the user's decision.
    """
    checkpoints = RunCheckpoints(folder, names)
    steps = checkpoints.steps()
    start = checkpoints.newest() if resume_from is None else resume_from
    if start and start not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(f"--resume-from {start}: {folder.path} has no such checkpoint; there are: {there} (0: base)")
    if start:
        checkpoints.require(start, config)
        checkpoints.restore_teachers(start)
    checkpoints.forget_after(start)
    for name in names:
        checkpoints.clear(name)
    return start


def _train(
    config: RunConfig, folder: RunFolder, names: list[str], start: int, console: Console, note: StatusFile
) -> None:
    if start:
        console.print(f"{folder.path}: continuing from step {start}")
    rhythm = config.rhythm
    plan = RunPlan(
        tuple(names), rhythm.cycles, rhythm.explore_steps, rhythm.exchange_steps, steered=rhythm.kind != "fixed"
    )
    site = open_site(config, folder)
    fleet = Fleet(config, folder, site) if config.rollout.engine == "sglang" else None
    try:
        if fleet is not None:
            fleet.start()
        with Progress(plan, folder.path, console, note=note) as progress:
            go_back = partial(_starting_point, config, folder, names, None)
            Supervisor(config, folder, site, fleet, progress, go_back).train(start)
    finally:
        if fleet is not None:
            fleet.stop()


@contextmanager
def _log_file(path: Path) -> Iterator[None]:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("copd_megatron")
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
