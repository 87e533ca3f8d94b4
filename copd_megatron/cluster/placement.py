"""Which nodes and GPUs each gang and each server gets. Pure: names of nodes in, places out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from copd_megatron.config.engines import BASE, frozen_group
from copd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from copd_megatron.config import RunConfig


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind: those of a branch's policy (called like the branch) or of its servers (`<branch>/engines`).

    `options` are what sbatch is told about them.
    """

    name: str
    nodes: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class GangPlace:
    """`ranks` processes on each of the `nodes` of group `group`, the first ones on the first node."""

    group: str
    nodes: tuple[str, ...]
    ranks: int


@dataclass(frozen=True)
class ServerPlace:
    """A server on `node` of group `group`, on GPUs from `first_gpu` on."""

    group: str
    node: str
    first_gpu: int


@dataclass(frozen=True)
class Placement:
    """Gangs by branch, servers by their group (`RunConfig.server_groups`)."""

    gangs: Mapping[str, GangPlace]
    servers: Mapping[str, tuple[ServerPlace, ...]]

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes that have something to do, each once."""
        places = [node for gang in self.gangs.values() for node in gang.nodes]
        places += [server.node for servers in self.servers.values() for server in servers]
        return tuple(dict.fromkeys(places))


def engines_of(branch: str) -> str:
    """What the nodes of a branch's servers are called under `disaggregated`."""
    return f"{branch}/engines"


def node_groups(config: RunConfig) -> tuple[NodeGroup, ...]:
    """The nodes that the run asks for, in the order in which it gets them."""
    cluster = config.cluster
    groups = []
    for branch in config.trained:
        name, engines = branch.name, engines_of(branch.name)
        groups.append(NodeGroup(name, cluster.policy_nodes(name), cluster.node_options.get(name, ())))
        if count := cluster.server_nodes(name):
            groups.append(NodeGroup(engines, count, cluster.node_options.get(engines, ())))
    return tuple(groups)


def place(config: RunConfig, nodes: Mapping[str, Sequence[str]]) -> Placement:
    """Everything's place on `nodes`, the names by group. Raises ConfigError if GPUs do not suffice."""
    gangs = {}
    for branch in config.trained:
        names = tuple(nodes[branch.name])
        gangs[branch.name] = GangPlace(branch.name, names, branch.parallel.world // len(names))
    return Placement(gangs, _servers(config, nodes, gangs))


def check(config: RunConfig) -> None:
    """Raise ConfigError if the run does not fit on the nodes that it asks for."""
    cluster = config.cluster
    names = [branch.name for branch in config.trained]
    for key, counts in {"nodes": cluster.nodes, "engine_nodes": cluster.engine_nodes}.items():
        if isinstance(counts, dict) and set(counts) != set(names):
            raise ConfigError(f"cluster.{key}: give one number for each of {', '.join(names)}, found {sorted(counts)}")
    groups = node_groups(config)
    if unknown := sorted(set(cluster.node_options) - {group.name for group in groups}):
        known = ", ".join(group.name for group in groups)
        raise ConfigError(f"cluster.node_options: {', '.join(unknown)} is none of this run's groups of nodes: {known}")
    for branch in config.trained:
        count, world = cluster.policy_nodes(branch.name), branch.parallel.world
        if world % count:
            raise ConfigError(
                f"cluster.nodes: the {world} processes of branch {branch.name} (parallel.world) cannot be divided over "
                f"{count} nodes evenly"
            )
        if 0 < cluster.gpus_per_node < world // count:
            raise ConfigError(
                f"cluster.nodes: branch {branch.name} has {world} processes (parallel.world), and {count} nodes of "
                f"{cluster.gpus_per_node} GPUs (cluster.gpus_per_node); it needs {-(-world // cluster.gpus_per_node)}"
            )
    _check_servers(config)
    place(config, {group.name: [f"{group.name}.{number}" for number in range(group.nodes)] for group in groups})


def own_servers(config: RunConfig) -> bool:
    """Whether the run starts servers itself."""
    return config.rollout.engine == "sglang" and not config.rollout.sglang.urls


def _check_servers(config: RunConfig) -> None:
    cluster, settings = config.cluster, config.rollout.sglang
    if not own_servers(config):
        if cluster.placement == "disaggregated":
            raise ConfigError(
                "cluster.placement = disaggregated gives nodes to servers that the run starts, and it starts none "
                "(rollout.engine, rollout.sglang.urls): take colocated"
            )
        return
    if settings.host != "127.0.0.1":
        raise ConfigError(
            f"rollout.sglang.host = {settings.host}: under Slurm every server listens on its own node's address "
            "(cluster.interface); leave it out"
        )
    if 0 < cluster.gpus_per_node < settings.tensor_parallel:
        raise ConfigError(
            f"rollout.sglang.tensor_parallel = {settings.tensor_parallel}: a server stays on one node, which has "
            f"{cluster.gpus_per_node} GPUs (cluster.gpus_per_node)"
        )
    spread = cluster.placement == "disaggregated" or any(gang.nodes > 1 for gang in node_groups(config))
    if spread and settings.transport == "shared_memory":
        raise ConfigError(
            "rollout.sglang.transport = shared_memory reaches servers on the node of their branch's rank 0 alone: take "
            "broadcast, or files"
        )


def _servers(
    config: RunConfig, nodes: Mapping[str, Sequence[str]], gangs: Mapping[str, GangPlace]
) -> dict[str, tuple[ServerPlace, ...]]:
    if not own_servers(config):
        return {}
    free = {name: _slots(config, nodes, gang) for name, gang in gangs.items()}
    wanted = config.rollout.sglang.servers
    places = {}
    for name in gangs:
        for group in (name, frozen_group(name)):
            if group in config.server_groups:
                places[group] = _take(config, group, free[name], wanted)
    if BASE in config.server_groups:
        left = [slot for slots in free.values() for slot in slots]
        places[BASE] = _take(config, BASE, left, wanted)
    return places


def _slots(config: RunConfig, nodes: Mapping[str, Sequence[str]], gang: GangPlace) -> list[ServerPlace]:
    """Places for servers beside a gang, in the order in which they are given away: node by node, then the next GPUs."""
    cluster, settings = config.cluster, config.rollout.sglang
    apart = cluster.placement == "disaggregated"
    group = engines_of(gang.group) if apart else gang.group
    if not cluster.gpus_per_node:  # no GPUs to run out of
        groups = 3
        return [ServerPlace(group, node, 0) for _ in range(groups * settings.servers) for node in nodes[group]]
    first = 0 if apart or settings.sleep else gang.ranks
    size = settings.tensor_parallel
    starts = range(first, cluster.gpus_per_node - size + 1, size)
    return [ServerPlace(group, node, start) for start in starts for node in nodes[group]]


def _take(config: RunConfig, group: str, slots: list[ServerPlace], count: int) -> tuple[ServerPlace, ...]:
    if len(slots) < count:
        settings = config.rollout.sglang
        shared = config.cluster.placement == "colocated" and not settings.sleep
        advice = "set rollout.sglang.sleep = true to share the policy's GPUs, " if shared else ""
        raise ConfigError(
            f"cluster: no GPUs are left for the servers of {group}: {count} of {settings.tensor_parallel} GPUs each "
            f"are wanted (rollout.sglang), {len(slots)} more have room; {advice}give more nodes, or start fewer servers"
            + (" (log.kl_to_base = false does without the base's)" if group == BASE else "")
        )
    taken = tuple(slots[:count])
    del slots[:count]
    return taken
