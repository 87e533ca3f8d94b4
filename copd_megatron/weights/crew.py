"""The processes that convert or merge one model together: one, or those that torchrun started.

Each does its share of the work; an error of one of them is the error of all, so that nobody waits for a process that
has given up. All must see the same files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from copd_megatron.errors import CopdError, WeightsError

Value = TypeVar("Value")

LONGEST_SHARE = timedelta(days=1)
"""How long a process may wait for the others' shares. One that dies is noticed at once, by its closed connection."""
CHECK_SECONDS = 0.5


class Failed(WeightsError):
    """What a process could not do, for a reason that is not the user's input: a full disk, a file that is gone."""


class Stopped(WeightsError):
    """Another process has failed at what this one was at."""


class Crew:
    """This process's `rank` among `size` that work together, and the `store` through which they tell of failures.

    With more than one, `together` and `gathered` are collective; they raise WeightsError if a process is gone.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank = rank
        self.size = size
        self._store = store
        self._work = 0
        self._checked = time.monotonic()

    def together(self, work: Callable[[], Value]) -> Value:
        """This process's result of `work`; an error in every process if it fails in one.

        The error is the CopdError that `work` raised, or Failed; in the processes that did not fail themselves it says
        which one did.
        """
        self._work += 1
        failure: CopdError | None = None
        try:
            value = work()
        except CopdError as error:
            failure = error
        except Exception as error:
            failure = Failed(f"{type(error).__name__}: {str(error).strip()}")
            failure.__cause__ = error
        except BaseException:
            self._tell()
            raise
        own = None if failure is None or isinstance(failure, Stopped) else (type(failure), str(failure))
        if own is not None:
            self._tell()
        failures = self.gathered(own)
        if failure is not None and own is not None:
            raise failure
        for rank, told in enumerate(failures):
            if told is not None:
                kind, reason = told
                raise kind(f"process {rank}: {reason}") from failure
        if failure is not None:
            raise failure
        return value

    def gathered(self, value: Value) -> list[Value]:
        """Every process's `value`, in order of rank."""
        everyone: list[Any] = [value] * self.size
        if self.size > 1:
            with _explained():
                dist.all_gather_object(everyone, value)
        return everyone

    def check(self) -> None:
        """Raise Stopped if another process has failed at the present `together`: for work that takes long.

        From any thread; it looks twice a second, however often it is called.
        """
        if self._store is None or time.monotonic() - self._checked < CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        with _explained():
            if self._store.check([self._failure]):
                raise Stopped("another process has failed")

    def share(self, sizes: Sequence[int]) -> range:
        """Which of a row of tasks are this process's: neighbours, with about the same total of `sizes` as others'."""
        total, before, mine = sum(sizes), 0, []
        for number, size in enumerate(sizes):
            if min(self.size - 1, (2 * before + size) * self.size // max(1, 2 * total)) == self.rank:
                mine.append(number)
            before += size
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    @property
    def _failure(self) -> str:
        return f"failed {self._work}"

    def _tell(self) -> None:
        if self._store is not None:
            with _explained():
                self._store.set(self._failure, "")


ALONE = Crew()


@contextmanager
def started_crew() -> Iterator[Crew]:
    """The processes that torchrun started; without torchrun, this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    store, rank, size = next(dist.rendezvous("env://"))
    store.set_timeout(LONGEST_SHARE)
    group = dist.PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=LONGEST_SHARE)
    try:
        yield Crew(rank, size, dist.PrefixStore("crew", store))
    finally:
        dist.destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"the processes have lost each other ({reason}); run the same command again") from error
