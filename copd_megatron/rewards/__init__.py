"""Judging responses: verifiers, each `(response, answer) -> reward in [0, 1]`, and a pool that runs them safely.

A verifier is found by name. Built in are `choice`, `choice_or_math`, `digits`, `exact`, `math` and `number`, one module
each. A package adds its own under the entry point group `copd_megatron.verifiers`; a data set can only name what is
installed. A verifier raises `Unparsable` when no answer can be read from the response, and ValueError when the gold
answer is not of the form it needs. Nothing here imports torch: worker processes must start fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from copd_megatron.errors import ConfigError

Verifier = Callable[[str, str], float]

ENTRY_POINTS = "copd_megatron.verifiers"
QUICK = frozenset({"choice", "digits", "exact", "number"})
"""Verifiers that take linear time and microseconds; the pool sends them many responses at once."""
_BUILT_IN = QUICK | {"math", "choice_or_math"}


@lru_cache
def verifier(name: str) -> Verifier:
    """The verifier called `name`. Raises ConfigError for an unknown name, ImportError if its package is missing."""
    if name in _BUILT_IN:
        found: Verifier = getattr(import_module(f"{__name__}.{name}"), name)
        return found
    return _entry_point(name).load()  # type: ignore[no-any-return]


@lru_cache
def known(name: str) -> None:
    """Check `name` without importing the verifier. Raises ConfigError that names the nearest one."""
    if name not in _BUILT_IN:
        _entry_point(name)


def verifier_names() -> list[str]:
    """All names that `verifier` accepts, in alphabetical order."""
    return sorted(_BUILT_IN | {point.name for point in entry_points(group=ENTRY_POINTS)})


def _entry_point(name: str) -> EntryPoint:
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return point
    names = verifier_names()
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown verifier {name!r}; {hint}known: {', '.join(names)}")
