"""The processes that convert one model together: one, or those that torchrun started.

Each does its share of the work; an error of one of them is the error of all, so that nobody waits for a process that
has given up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from copd_megatron.errors import CopdError, WeightsError

Value = TypeVar("Value")

LONGEST_SHARE = timedelta(days=1)
"""How long a process may wait for the others' shares. One that dies is noticed at once, by its closed connection."""


class Failed(WeightsError):
    """What a process could not do, for a reason that is not the user's input: a full disk, a file that is gone."""


@dataclass(frozen=True)
class Crew:
    """This process's `rank` among `size` that work together. With more than one, `together` and `gathered` are
    collective."""

    rank: int = 0
    size: int = 1

    def together(self, work: Callable[[], Value]) -> Value:
        """This process's result of `work`; an error in every process if it fails in one.

        The error is the CopdError that `work` raised, or Failed.
        """
        failure: CopdError | None = None
        try:
            value = work()
        except CopdError as error:
            failure = error
        except Exception as error:
            failure = Failed(f"{type(error).__name__}: {str(error).strip()}")
            failure.__cause__ = error
        failures = self.gathered(None if failure is None else (type(failure), str(failure)))
        if failure is not None:
            raise failure
        for kind, reason in filter(None, failures):
            raise kind(reason)
        return value

    def gathered(self, value: Value) -> list[Value]:
        """Every process's `value`, in order of rank."""
        everyone: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(everyone, value)
        return everyone

    def share(self, sizes: Sequence[int]) -> range:
        """Which of a row of tasks are this process's: neighbours, with about the same total of `sizes` as others'."""
        total, before, mine = sum(sizes), 0, []
        for number, size in enumerate(sizes):
            if min(self.size - 1, (2 * before + size) * self.size // max(1, 2 * total)) == self.rank:
                mine.append(number)
            before += size
        return range(mine[0], mine[-1] + 1) if mine else range(0)


ALONE = Crew()


@contextmanager
def started_crew() -> Iterator[Crew]:
    """The processes that torchrun started; without torchrun, this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=LONGEST_SHARE)
    try:
        yield Crew(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
