"""What is trained, from where and by whose teaching, under each `method` (docs/method.md, "Baselines and controls").

method       trained                 starts from      taught by
copd         every branch            the base         its peers as they are, by the topology
merge_only   every branch            the base         nobody
expert       the branch `student`    the base         nobody
mixed        one, on all data        the base         nobody
static_opd   the branch `student`    its expert       the frozen experts of its teachers in the topology
mopd         one, on all data        the base         all frozen experts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from copd_megatron.config.branches import BranchConfig, BranchData
from copd_megatron.topology import edges_of

if TYPE_CHECKING:
    from copd_megatron.config.run import RunConfig

Method = Literal["copd", "merge_only", "expert", "mixed", "static_opd", "mopd"]
WITH_STUDENT = ("expert", "static_opd")
ON_ALL_DATA = ("mixed", "mopd")
DISTILLING = ("static_opd", "mopd")
"""Methods whose teachers are finished experts."""


def trained(config: RunConfig) -> tuple[BranchConfig, ...]:
    """The branches that get a gang. One on all data is called as its method, and laid out as the first branch."""
    if config.method in WITH_STUDENT:
        return tuple(branch for branch in config.branches if branch.name == config.student)
    if config.method in ON_ALL_DATA:
        data = BranchData(mixture=tuple(branch.data for branch in config.branches))
        return (BranchConfig(name=config.method, data=data, parallel=config.branches[0].parallel),)
    return config.branches


def edges(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """(student, teacher) pairs in force."""
    names = [branch.name for branch in config.branches]
    if config.method == "mopd":
        return tuple((config.method, name) for name in names)
    drawn = edges_of(config.topology, names)
    if config.method == "static_opd":
        return tuple(edge for edge in drawn if edge[0] == config.student)
    return drawn if config.method == "copd" else ()


def check(config: RunConfig) -> None:
    """Raise ValueError unless `student`, `experts`, `rhythm` and `rollout` are what the method needs."""
    method, names = config.method, [branch.name for branch in config.branches]
    if (method in WITH_STUDENT) != (config.student is not None) or config.student not in (None, *names):
        wanted = f"one of {', '.join(names)}" if method in WITH_STUDENT else "none"
        raise ValueError(f"student = {config.student!r}: method {method} expects {wanted}")
    if method in ON_ALL_DATA and method in names:
        raise ValueError(f"branches: under method {method} this is the name of the one that learns; rename {method!r}")
    needed = {name for edge in edges(config) for name in edge if name in names} if method in DISTILLING else set()
    if missing := sorted(needed - config.experts.keys()):
        raise ValueError(
            f"experts: no folder for {', '.join(missing)}; give the final models of a run with method merge_only or "
            "expert, as in {text: runs/experts/branches/text/final}"
        )
    if unknown := sorted(config.experts.keys() - (set(names) if method in DISTILLING else set())):
        raise ValueError(f"experts: {', '.join(unknown)} is of no use to method {method}")
    if config.rhythm.kind != "fixed" and not edges(config):
        raise ValueError(
            f"rhythm.kind = {config.rhythm.kind} is steered by the overlap of students with their teachers, and nobody "
            "has a teacher; give a topology, or kind: fixed"
        )
    if method in DISTILLING:
        _check_distilling(config)


def _check_distilling(config: RunConfig) -> None:
    rhythm = config.rhythm
    if not edges(config):
        raise ValueError(f"topology: {config.student} has no teacher, and method {config.method} is nothing else")
    if rhythm.kind != "fixed" or rhythm.explore_steps:
        raise ValueError(
            f"rhythm: method {config.method} distils from finished experts and has no Phase I; set kind: fixed and "
            "explore_steps: 0 (a cycle is then an epoch of exchange_steps updates)"
        )
    if config.teacher.where != "engine":
        raise ValueError(
            f"teacher.where = {config.teacher.where}: finished experts teach from engines; set it to engine"
        )
    if config.rollout.engine != "embedded":
        raise ValueError(f"rollout.engine = {config.rollout.engine}: frozen teachers need the embedded engine")
