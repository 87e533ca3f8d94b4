"""`copd train`: starts one gang per branch, watches, shows progress, merges, evaluates, reports.

The conductor holds no model and takes no part in training; if it is started again on the same run directory it goes on
from the newest checkpoint of all branches together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from rich.console import Console

from copd_megatron.budget import write_summary
from copd_megatron.config import RunConfig
from copd_megatron.errors import ConfigError, CopdError, Interrupted
from copd_megatron.evaluate.final import evaluate_run
from copd_megatron.exchange import Supervision, serve
from copd_megatron.gang import Gang
from copd_megatron.observe.environment import record_environment
from copd_megatron.observe.metrics import merge_metrics
from copd_megatron.observe.pace import RunPlan
from copd_megatron.observe.progress import Progress
from copd_megatron.observe.report import build_report
from copd_megatron.observe.status import BranchStatus
from copd_megatron.rollout.sglang.fleet import Fleet
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder
from copd_megatron.run_lock import conductor_lock
from copd_megatron.signals import heeding
from copd_megatron.topology import untaught
from copd_megatron.weights.merge.folders import merge_folders

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25


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
    with conductor_lock(folder.path), _log_file(folder.log):
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
            _train(config, folder, names, start, console)
        if len(names) > 1 and not folder.merged.exists():
            merge_folders(
                [folder.final(name) for name in names],
                out=folder.merged,
                base=Path(config.base),
                recipe=config.merge.recipe(names, config.seed),
                console=console,
            )
            console.print(f"merged model: {folder.merged}")
        if not folder.evaluation.exists():
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


def _train(config: RunConfig, folder: RunFolder, names: list[str], start: int, console: Console) -> None:
    if start:
        console.print(f"{folder.path}: continuing from step {start}")
    checkpoints = RunCheckpoints(folder, names)
    store = serve()
    supervision = Supervision(store, names)
    fleet = Fleet(config, folder) if config.rollout.engine == "sglang" else None
    if fleet is not None:
        fleet.start()
    gangs = {
        branch.name: Gang(
            branch.name,
            branch.parallel.world,
            ["--run-dir", str(folder.path), "--branch", branch.name, "--store", f"{store.host}:{store.port}",
             "--resume", str(start)],
            folder.branch(branch.name) / "log.txt",
        )
        for branch in config.trained
    }  # fmt: skip
    rhythm = config.rhythm
    steered = rhythm.kind != "fixed"
    plan = RunPlan(tuple(names), rhythm.cycles, rhythm.explore_steps, rhythm.exchange_steps, steered)
    try:
        with _stop_on_signal() as stop, Progress(plan, folder.path, console) as progress:
            _watch(gangs, fleet, supervision, progress, stop)
    finally:
        for gang in gangs.values():
            gang.kill()
        if fleet is not None:
            fleet.stop()
    endings = {name: supervision.ending(name) or "died without a word" for name in names}
    if all(ending == "done" for ending in endings.values()):
        return
    if all(ending in ("done", "interrupted") for ending in endings.values()):
        raise Interrupted(f"stopped; the same command continues from step {checkpoints.newest()}")
    raise CopdError(_explain(endings, gangs, checkpoints.newest()))


def _watch(
    gangs: dict[str, Gang], fleet: Fleet | None, supervision: Supervision, progress: Progress, stop: _StopRequest
) -> None:
    """Until every gang has ended: pass on status lines, deaths, and the wish to stop; start servers again that died."""
    running = set(gangs)
    asked = False
    while running:
        _show(supervision, progress)
        for name in sorted(running):
            status = gangs[name].poll()
            if status is None:
                continue
            running.remove(name)
            ending = supervision.ending(name)
            if status != 0 or ending not in ("done", "interrupted"):
                reason = ending or f"its process died, exit status {status}"
                log.error("branch %s: %s", name, reason)
                progress.event(name, reason)
                supervision.lost(name, reason)
        for event in fleet.watch(supervision.hung()) if fleet is not None else ():
            progress.event("CoPD", event)
        if stop.requested and not asked:
            asked = True
            step = supervision.stop()
            progress.event("CoPD", f"stopping: all branches save step {step} and end (again to stop at once)")
        if stop.insisted:
            return
        time.sleep(_POLL_SECONDS)
    _show(supervision, progress)


def _show(supervision: Supervision, progress: Progress) -> None:
    for name, line in supervision.statuses().items():
        progress.update(name, BranchStatus.from_json(line))
    for name, event in supervision.events():
        progress.event(name, event)


def _explain(endings: dict[str, str], gangs: dict[str, Gang], step: int) -> str:
    lines = [f"branch {name}: {ending} (log: {gangs[name].log})" for name, ending in endings.items()]
    silent = [name for name, ending in endings.items() if ending.startswith("died")]
    lines += [f"--- end of {gangs[name].log}\n{gangs[name].last_words()}" for name in silent]
    if not any("--resume-from" in ending for ending in endings.values()):
        lines.append(f"The same command continues from step {step}.")
    return "\n".join(lines)


class _StopRequest:
    """How often the user has asked to stop."""

    def __init__(self) -> None:
        self._count = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self._count += 1

    @property
    def requested(self) -> bool:
        return self._count > 0

    @property
    def insisted(self) -> bool:
        return self._count > 1


@contextmanager
def _stop_on_signal() -> Iterator[_StopRequest]:
    request = _StopRequest()
    with heeding(request):
        yield request


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
