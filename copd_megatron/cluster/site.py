"""Where a run's processes are started: beside the conductor, or as steps of its Slurm job."""

from __future__ import annotations

import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from copd_megatron.cluster import slurm
from copd_megatron.cluster.node_check import Node, Wanted, check_nodes
from copd_megatron.cluster.placement import node_groups, place
from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError
from copd_megatron.run_folder import RunFolder
from copd_megatron.supervision.gang import Gang
from copd_megatron.supervision.ports import free_ports
from copd_megatron.supervision.processes import seats

OVERRULED = ("NTASKS", "NPROCS", "CPUS_PER_TASK", "MEM_PER", "GPUS", "GRES", "TRES", "DISTRIBUTION", "CPU_BIND")
"""Beginnings, behind SLURM_, of what sbatch's options leave in the environment for every srun: steps have their own."""


@dataclass(frozen=True)
class Spot:
    """Where a server listens, what its command starts with, and what it is told there."""

    host: str
    port: int
    launcher: tuple[str, ...] = (sys.executable,)
    arguments: Mapping[str, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    remote: bool = False


class Site(Protocol):
    """What the conductor needs of it. `address` is where everything that it starts reaches the conductor."""

    address: str

    def gang(self, branch: str, arguments: Sequence[str]) -> Gang:
        """Start the ranks of a branch."""

    def server(self, group: str, number: int) -> Spot:
        """The place of a server."""


class OneMachine:
    """Everything runs here, and nobody else is listened to."""

    address = "127.0.0.1"

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder
        self._given: set[int] = set()

    def gang(self, branch: str, arguments: Sequence[str]) -> Gang:
        """Start the ranks of a branch."""
        environments = [{**os.environ, **seat} for seat in seats(self._config.branch(branch).parallel.world)]
        log = self._folder.branch(branch) / "log.txt"
        return Gang(branch, [sys.executable], arguments, self.address, environments, log)

    def server(self, group: str, number: int) -> Spot:
        """An address of this machine, and a port that is free there."""
        host = self._config.rollout.sglang.host
        port = next(port for port in free_ports(host, len(self._given) + 1) if port not in self._given)
        self._given.add(port)
        return Spot(host, port)


class SlurmSite:
    """Every gang and every server is a step of the job around this process. Raises CopdError if a node is not fit."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        self._config = config
        self._folder = folder
        self._allocation = slurm.current(node_groups(config))
        self._placement = place(config, self._allocation.nodes)
        folder_path, base = folder.path.absolute(), Path(config.base).absolute()
        mounts = [str(place) for place in (Path.cwd(), folder_path, base)]
        self._pyxis, self._apptainer = slurm.of_container(config.cluster.container, mounts)
        inside = config.cluster.container
        self._python = [*self._apptainer, sys.executable if inside is None else inside.python]
        self._environment = environment_of_steps(config)
        self._nodes = self._checked(Wanted(folder.path, base, config.cluster.interface, config.cluster.gpus_per_node))
        self._free = {name: list(node.ports) for name, node in self._nodes.items()}
        first = os.environ.get("SLURMD_NODENAME", "")
        if first not in self._nodes:
            raise CopdError(
                f"`copd train` runs on {first or socket.gethostname()}, which is not a node of this run's "
                f"({', '.join(self._nodes)}): start it in the batch script, or within salloc by srun"
            )
        self.address = self._nodes[first].address

    def gang(self, branch: str, arguments: Sequence[str]) -> Gang:
        """Start the ranks of a branch with srun, a log for each."""
        home = self._placement.gangs[branch]
        logs = self._folder.branch(branch).absolute() / "ranks"
        launcher = self._srun(home.group, home.nodes, home.ranks, logs / "rank_%t.txt")
        host = self._nodes[home.nodes[0]].address
        log = self._folder.branch(branch) / "log.txt"
        return Gang(branch, launcher, arguments, host, [self._environment], log, logs)

    def server(self, group: str, number: int) -> Spot:
        """An address of the server's node, a port that is free there, and an srun."""
        home = self._placement.servers[group][number]
        on_gpus = {"base-gpu-id": home.first_gpu} if self._config.cluster.gpus_per_node else {}
        return Spot(
            self._nodes[home.node].address,
            self._free[home.node].pop(),
            tuple(self._srun(home.group, [home.node], 1)),
            on_gpus,
            self._environment,
            remote=True,
        )

    def _srun(self, group: str, nodes: Sequence[str], tasks: int, output: Path | None = None) -> list[str]:
        gpus = self._config.cluster.gpus_per_node
        return [*self._allocation.srun(group, nodes, tasks, gpus, output, self._pyxis), *self._python]

    def _checked(self, wanted: Wanted) -> dict[str, Node]:
        nodes = self._placement.nodes
        addresses = {} if wanted.interface is not None else slurm.addresses(nodes)
        servers = Counter(home.node for homes in self._placement.servers.values() for home in homes)
        arguments = wanted.arguments(addresses, max(servers.values(), default=0))
        module = ["-m", "copd_megatron.cluster.node_report"]
        commands = {
            names: [*self._srun(group, names, 1), *module, *arguments]
            for group, names in self._allocation.components_of(nodes)
        }
        return check_nodes(commands, wanted, self._environment)


def open_site(config: RunConfig, folder: RunFolder) -> Site:
    """The place that the configuration names. Raises CopdError, before anything is started, if it cannot be used."""
    return SlurmSite(config, folder) if config.cluster.launcher == "slurm" else OneMachine(config, folder)


def environment_of_steps(config: RunConfig, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What ranks and servers get: the job's environment, without what would change srun or passes for a rank on one
    machine, and the interfaces."""
    kept = {
        name: value
        for name, value in environment.items()
        if not (name.startswith("SLURM_") and name.removeprefix("SLURM_").startswith(OVERRULED)) and name != "RANK"
    }
    interface = config.cluster.interface
    named = {} if interface is None else {"NCCL_SOCKET_IFNAME": interface, "GLOO_SOCKET_IFNAME": interface}
    return {**kept, **named, **config.cluster.environment}
