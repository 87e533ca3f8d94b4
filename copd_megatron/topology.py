"""Who teaches whom: directed edges student ← teacher (docs/method.md, "Topology")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

PRESETS = ("pair", "hub", "mesh", "ring", "none")


class DirectedEdge(Protocol):
    """Anything with a student and a teacher."""

    @property
    def student(self) -> str: ...

    @property
    def teacher(self) -> str: ...


@runtime_checkable
class NamedHub(Protocol):
    """A hub by name."""

    @property
    def hub(self) -> str: ...


def edges_of(topology: str | NamedHub | Sequence[DirectedEdge], branches: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The (student, teacher) pairs of a preset, of a named hub or of an explicit list.

    `pair`: both directions between two branches. `hub`: the first branch, or the one named, is the hub; every other one
    exchanges with it in both directions. `mesh`: everybody teaches everybody. `ring`: each is taught by the next.
    `none`: nobody. In a list cycles are fine, and so is a branch without a teacher (`untaught`).

    Raises ValueError for an unknown preset or branch, a branch that teaches itself, a repeated edge, or `pair` with
    more than two branches.
    """
    if isinstance(topology, NamedHub):
        if topology.hub not in branches:
            raise ValueError(f"topology: unknown hub {topology.hub!r}; the branches are {', '.join(branches)}")
        return _hub(topology.hub, branches)
    if not isinstance(topology, str):
        return _checked([(edge.student, edge.teacher) for edge in topology], branches)
    if topology == "pair" and len(branches) > 2:
        raise ValueError(f"topology: `pair` needs two branches, found {len(branches)}; take hub, mesh or ring")
    if topology in ("pair", "mesh"):
        return tuple((student, teacher) for student in branches for teacher in branches if student != teacher)
    if topology == "hub":
        return _hub(branches[0], branches)
    if topology == "ring":
        turned = [*branches[1:], branches[0]]
        return tuple(
            (student, teacher) for student, teacher in zip(branches, turned, strict=True) if student != teacher
        )
    if topology == "none":
        return ()
    raise ValueError(f"topology: unknown preset {topology!r}; expected one of {', '.join(PRESETS)} or a list of edges")


def untaught(edges: Sequence[tuple[str, str]], branches: Sequence[str]) -> tuple[str, ...]:
    """Branches without a teacher although others have one: their Phase II is reinforcement learning alone."""
    students = {student for student, _ in edges}
    return tuple(name for name in branches if name not in students) if students else ()


def _hub(hub: str, branches: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple(edge for spoke in branches if spoke != hub for edge in ((hub, spoke), (spoke, hub)))


def _checked(edges: list[tuple[str, str]], branches: Sequence[str]) -> tuple[tuple[str, str], ...]:
    for student, teacher in edges:
        for name in (student, teacher):
            if name not in branches:
                raise ValueError(f"topology: unknown branch {name!r}; the branches are {', '.join(branches)}")
        if student == teacher:
            raise ValueError(f"topology: branch {student!r} cannot teach itself")
    if len(set(edges)) != len(edges):
        raise ValueError(f"topology: an edge is given twice in {edges}")
    return tuple(edges)
