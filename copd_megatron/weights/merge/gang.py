"""Processes that merge together: each writes its shards, and an error of one ends all with that error.

Started by torchrun, they talk through its store alone; a single process needs nothing of the kind. All must see the
same files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from copd_megatron.errors import CopdError, WeightsError

_POLL_SECONDS = 0.05
_CHECK_SECONDS = 0.5
_FAREWELL_SECONDS = 20.0
_FAILED, _LEFT = "failed", "left"


class Gang:
    """`world` processes, of which this is `rank`; `store` is a torch.distributed store, None for a single process."""

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self._checked = time.monotonic()

    @staticmethod
    def from_environment() -> Gang:
        """Of the processes that torchrun has started; a single one without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return Gang()
        from torch.distributed import rendezvous

        store, rank, world = next(rendezvous("env://"))
        return Gang(rank, world, store)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within it, an error of one process is raised in all that `check` or `meet`."""
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise
        finally:
            self._leave()

    def first(self, action: Callable[[], None], name: str) -> None:
        """Have the first process do something that the others wait for."""
        if self.rank == 0:
            action()
        self.meet(name)

    def meet(self, name: str) -> None:
        """Wait until all processes have come here. Raises WeightsError if one has failed instead."""
        if self._store is None:
            return
        with _explained():
            self._store.add(name, 1)
            while self._store.add(name, 0) < self.world:
                self._raise_failure()
                time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raise WeightsError if another process has failed; looks twice a second, however often it is called."""
        if self._store is None or time.monotonic() - self._checked < _CHECK_SECONDS:
            return
        self._checked = time.monotonic()
        with _explained():
            self._raise_failure()

    def _raise_failure(self) -> None:
        if self._store.check([_FAILED]):
            raise WeightsError(self._store.get(_FAILED).decode())

    def _tell(self, error: BaseException) -> None:
        if self._store is None:
            return
        reason = str(error) if isinstance(error, CopdError) else f"{type(error).__name__}: {error}"
        try:
            if not self._store.check([_FAILED]):
                self._store.set(_FAILED, f"process {self.rank}: {reason}")
        except RuntimeError:
            return  # nobody is left to be told

    def _leave(self) -> None:
        """The first process, which may keep the store, stays until the others have read what is in it."""
        if self._store is None:
            return
        try:
            self._store.add(_LEFT, 1)
            deadline = time.monotonic() + _FAREWELL_SECONDS
            while self.rank == 0 and self._store.add(_LEFT, 0) < self.world and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        except RuntimeError:
            return


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WeightsError(
            f"the merging processes have lost each other ({error}); run the same command again"
        ) from error
