"""The batch script of a run, from the templates in `launchers/`. Pure: configurations in, text out."""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from copd_megatron.cluster.placement import NodeGroup, node_groups
from copd_megatron.config import RunConfig
from copd_megatron.errors import ConfigError
from copd_megatron.run_folder import RunFolder


def batch_script(config: RunConfig, name: str, run_dirs: Mapping[int | None, Path]) -> str:
    """The script for sbatch, with a run directory per seed if the job is an array, else one under None.

    `name` is the job's. With `cluster.node_options` the job is heterogeneous, one component per group of nodes.
    """
    cluster = config.cluster
    seeds = [seed for seed in run_dirs if seed is not None]
    if seeds and cluster.node_options:
        raise ConfigError(
            "cluster.node_options: Slurm has no arrays of heterogeneous jobs; launch the seeds one by one"
        )
    groups = node_groups(config)
    components = [_nodes(config, group) for group in groups]
    if not cluster.node_options:
        components = [_nodes(config, NodeGroup("all", sum(group.nodes for group in groups)))]
    if odd := [str(folder) for folder in run_dirs.values() if re.search(r"[\n%\\]", str(folder))]:
        raise ConfigError(
            f"run_dir: {odd[0]!r} has a newline, % or \\ in it, which sbatch would take for something else"
        )
    number = "%A_%a" if seeds else "%j"
    first = RunFolder(next(iter(run_dirs.values()))).slurm.absolute()
    components[0] = [
        f"--job-name={name}",
        f"--output={first}/{number}.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{cluster.signal_seconds}",
        *([f"--array={','.join(map(str, seeds))}"] if seeds else []),
        *([f"--time={math.ceil(60 * cluster.hours)}"] if cluster.hours else []),
        *components[0],
    ]
    return _fill("slurm/copd.sbatch", components=components, seeds=seeds, run_dirs=_absolute(run_dirs))


def local_script(config: RunConfig, run_dir: Path) -> str:
    """The script for this machine."""
    interface = config.cluster.interface
    named = {} if interface is None else {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return _fill("local/copd.sh", environment={**named, **config.cluster.environment}, run_dir=str(run_dir.absolute()))


def _nodes(config: RunConfig, group: NodeGroup) -> list[str]:
    cluster = config.cluster
    named = {"partition": cluster.partition, "account": cluster.account}
    return [
        f"--nodes={group.nodes}",
        "--exclusive",
        *(f"--{key}={value}" for key, value in named.items() if value),
        *([f"--gpus-per-node={cluster.gpus_per_node}"] if cluster.gpus_per_node else []),
        *cluster.options,
        *group.options,
    ]


def _absolute(run_dirs: Mapping[int | None, Path]) -> dict[int | None, str]:
    return {seed: str(folder.absolute()) for seed, folder in run_dirs.items()}


def _fill(template: str, **values: Any) -> str:
    text = resources.files("copd_launchers").joinpath(template).read_text()
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["quoted"] = shlex.quote
    return environment.from_string(text).render(python=sys.executable, **values)


def seeds_of(text: str) -> Sequence[int]:
    """The seeds in "0,1,2". Raises ConfigError."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {text!r}: expected numbers separated by commas, for example 0,1,2") from error
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError(f"--seeds {text!r}: expected different numbers from 0 on")
    return seeds
