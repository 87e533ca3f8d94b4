"""`copd launch`: the run directory is opened, the script is written there and submitted, or run here."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from copd_megatron.cluster import slurm
from copd_megatron.cluster.script import batch_script, local_script, seeds_of
from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import ConfigError, CopdError
from copd_megatron.files import write_atomic
from copd_megatron.run_folder import RunFolder

SCRIPT, JOB = "copd.sbatch", "job.json"


def launch(
    file: Path, overrides: Sequence[str], seeds: str | None, on_slurm: bool, dry_run: bool, console: Console
) -> int:
    """Submit the run, or one for each of the `seeds`, or run it here; the exit status. Raises CopdError.

    A `dry_run` shows the script and touches nothing.
    """
    given = [*overrides, *(["cluster.launcher=slurm"] if on_slurm else [])]
    numbers: Sequence[int | None] = [None] if seeds is None else seeds_of(seeds)
    configs = {seed: load_config(file, [*given, *_seed(seed)], RunConfig) for seed in numbers}
    folders = {seed: RunFolder(config.run_dir) for seed, config in configs.items()}
    first = configs[numbers[0]]
    if first.cluster.launcher == "local":
        if seeds is not None:
            raise ConfigError("--seeds is a Slurm array; on one machine launch the seeds one after another")
        return _here(first, folders[None], dry_run, console)
    _apart(folders)
    name = f"copd-{re.sub(r'[^A-Za-z0-9_.-]', '_', Path(first.run_dir).name if seeds is None else file.stem)}"
    script = batch_script(first, name, {seed: folder.path for seed, folder in folders.items()})
    if dry_run:
        console.print(script, markup=False, highlight=False, soft_wrap=True, end="")
        return 0
    for folder in folders.values():
        _not_queued(folder)
    for seed, folder in folders.items():
        if folder.open(configs[seed]):
            folder.adopt(configs[seed])
        folder.slurm.mkdir(exist_ok=True)
    place = folders[numbers[0]].slurm / SCRIPT
    write_atomic(place, script)
    job = slurm.run("sbatch", "--parsable", str(place)).strip().split(";")[0]
    for folder in folders.values():
        write_atomic(folder.slurm / JOB, json.dumps({"job": job}))
        console.print(f"job {job}: {folder.path} (copd status {folder.path})", soft_wrap=True)
    return 0


def _here(config: RunConfig, folder: RunFolder, dry_run: bool, console: Console) -> int:
    script = local_script(config, folder.path)
    if dry_run:
        console.print(script, markup=False, highlight=False, soft_wrap=True, end="")
        return 0
    if folder.open(config):
        folder.adopt(config)
    place = folder.path / "copd.sh"
    write_atomic(place, script)
    return subprocess.run(["bash", str(place)], check=False).returncode


def _seed(seed: int | None) -> list[str]:
    return [] if seed is None else [f"seed={seed}"]


def _apart(folders: dict[int | None, RunFolder]) -> None:
    """Two tasks of an array must not write to one run directory."""
    owners: dict[str, int | None] = {}
    for seed, folder in folders.items():
        place = os.path.abspath(folder.path)
        if place in owners:
            raise ConfigError(
                f"--seeds: seeds {owners[place]} and {seed} have the same run directory {folder.path}; put ${{seed}} "
                "into run_dir, for example run_dir: runs/mini_seed${seed}"
            )
        owners[place] = seed


def _not_queued(folder: RunFolder) -> None:
    file = folder.slurm / JOB
    if not file.exists():
        return
    job = json.loads(file.read_text())["job"]
    try:
        waiting = slurm.run("squeue", "--noheader", "--jobs", job).strip()
    except CopdError:  # Slurm has forgotten it
        return
    if waiting:
        raise CopdError(f"{folder.path}: job {job} of this run is still queued or running; scancel {job} to end it")
