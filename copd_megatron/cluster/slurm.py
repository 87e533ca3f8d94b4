"""The Slurm job that this process runs in: its nodes, and the srun commands that start something on them."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from copd_megatron.cluster.placement import NodeGroup
from copd_megatron.config.cluster import ContainerConfig
from copd_megatron.errors import ConfigError, CopdError

_COMMAND_SECONDS = 120.0


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job by group; `components` says which part of a heterogeneous job a group is, if it is one."""

    job: str
    nodes: Mapping[str, tuple[str, ...]]
    components: Mapping[str, int]

    def components_of(self, nodes: Collection[str]) -> list[tuple[str, tuple[str, ...]]]:
        """`nodes` as far as one srun reaches, which is a component of a heterogeneous job, each with one of its
        groups."""
        if not self.components:
            return [(next(iter(self.nodes)), tuple(nodes))]
        found = [(group, tuple(node for node in names if node in nodes)) for group, names in self.nodes.items()]
        return [(group, names) for group, names in found if names]

    def srun(
        self,
        group: str,
        nodes: Sequence[str],
        tasks_per_node: int,
        gpus_per_node: int,
        output: Path | None = None,
        container: Sequence[str] = (),
    ) -> list[str]:
        """An srun that starts `tasks_per_node` tasks on each of `nodes`, beside whatever else runs there.

        When one task ends with an error, all are ended. `output` may hold %t, the task's number.
        """
        words = ["srun", "--overlap", "--overcommit", "--kill-on-bad-exit=1", "--mem=0", "--cpu-bind=none"]
        if group in self.components:
            words.append(f"--het-group={self.components[group]}")
        words += [f"--nodelist={','.join(nodes)}", f"--nodes={len(nodes)}", "--distribution=block"]
        words += [f"--ntasks={tasks_per_node * len(nodes)}", f"--ntasks-per-node={tasks_per_node}"]
        if gpus_per_node:
            words += [f"--gpus-per-node={gpus_per_node}", "--gpu-bind=none"]
        if output is not None:
            words += [f"--output={output}", "--open-mode=append", "--input=none"]
        return [*words, *container]


def current(groups: Sequence[NodeGroup], environment: Mapping[str, str] = os.environ) -> Allocation:
    """The job around this process, its nodes given to `groups` in order. Raises ConfigError outside of a job, or in one
    of another size."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        raise ConfigError(
            "cluster.launcher = slurm: this is not inside a Slurm job. Submit it with `copd launch CONFIG --slurm`, or "
            "start it within salloc"
        )
    parts = int(environment.get("SLURM_HET_SIZE", "0"))
    if parts:
        if parts != len(groups):
            wanted = ", ".join(group.name for group in groups)
            raise ConfigError(f"the Slurm job has {parts} components, the run's groups of nodes are {wanted}")
        lists = [hostnames(environment[f"SLURM_JOB_NODELIST_HET_GROUP_{part}"]) for part in range(parts)]
        components = {group.name: part for part, group in enumerate(groups)}
    else:
        names = hostnames(environment["SLURM_JOB_NODELIST"])
        ends = [sum(group.nodes for group in groups[: number + 1]) for number in range(len(groups))]
        lists = [names[end - group.nodes : end] for end, group in zip(ends, groups, strict=True)]
        lists[-1] = names[ends[-1] - groups[-1].nodes :]
        components = {}
    for group, found in zip(groups, lists, strict=True):
        if len(found) != group.nodes:
            raise ConfigError(
                f"the Slurm job {job} has not the nodes that the run asks for: {group.name} gets {len(found)}, cluster "
                f"wants {group.nodes} ({sum(each.nodes for each in groups)} altogether)"
            )
    by_name = {group.name: tuple(found) for group, found in zip(groups, lists, strict=True)}
    return Allocation(job, by_name, components)


def hostnames(nodelist: str) -> list[str]:
    """The names in Slurm's notation: "n[1-2]" are n1 and n2."""
    return run("scontrol", "show", "hostnames", nodelist).split()


def addresses(nodes: Sequence[str]) -> dict[str, str]:
    """The address (IPv4) by which Slurm knows each node. Raises CopdError for a name that does not resolve."""
    found = {}
    for line in run("scontrol", "--oneliner", "show", "node", ",".join(nodes)).splitlines():
        values = {key: value for key, _, value in (word.partition("=") for word in line.split())}
        if "NodeName" in values:
            found[values["NodeName"]] = _resolved(values.get("NodeAddr", values["NodeName"]))
    if missing := [node for node in nodes if node not in found]:
        raise CopdError(f"scontrol show node says nothing about {', '.join(missing)}; set cluster.interface")
    return found


def run(*words: str) -> str:
    """What one of Slurm's commands says. Raises CopdError with its complaint."""
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_SECONDS)
    except FileNotFoundError as error:
        raise CopdError(f"{words[0]}: not found; is this a machine from which Slurm jobs are submitted?") from error
    except subprocess.TimeoutExpired as error:
        raise CopdError(f"{' '.join(words)}: no answer within {_COMMAND_SECONDS:g} s") from error
    if result.returncode:
        raise CopdError(f"{' '.join(words)}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def of_container(container: ContainerConfig | None, mounts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a container adds to an srun (pyxis), and to the command behind it (apptainer); `mounts` beside its own."""
    if container is None:
        return [], []
    places = dict.fromkeys([*mounts, *container.mounts])
    if container.runtime == "pyxis":
        both = [place if ":" in place else f"{place}:{place}" for place in places]
        image = [f"--container-image={container.image}", f"--container-mounts={','.join(both)}"]
        return [*image, "--no-container-mount-home", f"--container-workdir={os.getcwd()}"], []
    binds = [word for place in places for word in ("--bind", place)]
    return [], ["apptainer", "exec", "--nv", "--pwd", os.getcwd(), *binds, container.image]


def _resolved(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise CopdError(
            f"Slurm's address {name!r} of a node does not resolve here ({error}); set cluster.interface"
        ) from error
