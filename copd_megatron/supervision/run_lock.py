"""One `copd train` per run directory, and none before the last one's processes are gone.

    run_dir/.conductor.lock     held by the conductor
    run_dir/.workers.lock       shared by all ranks of all gangs

The system lets go of a lock when its holder ends, however it ends.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from copd_megatron.errors import CopdError

_PATIENCE_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1
"""prctl(2): the signal that this process gets when the one that started it dies."""

_prctl = getattr(ctypes.CDLL(None), "prctl", None)  # looked up here: a process just forked should not load libraries


@contextmanager
def conductor_lock(run_dir: Path) -> Iterator[None]:
    """Have `run_dir` to oneself. Raises CopdError if another `copd train` has it, or if one that was killed has left
    ranks that do not end."""
    with open(run_dir / ".conductor.lock", "w") as own, open(run_dir / ".workers.lock", "w") as workers:
        if not _acquire(own.fileno(), 0.0):
            raise CopdError(f"{run_dir}: another `copd train` is running on this run directory; wait for it or stop it")
        if not _acquire(workers.fileno(), _PATIENCE_SECONDS):
            raise CopdError(
                f"{run_dir}: ranks of an earlier `copd train` that is gone are still at work (`ps` shows them as "
                "copd_megatron.worker): they make a checkpoint and end; start again when they have"
            )
        fcntl.flock(workers, fcntl.LOCK_UN)
        yield


def wait_for_workers(run_dir: Path, patience: float) -> bool:
    """Whether no rank is at work in `run_dir` any more, within `patience` seconds."""
    with open(run_dir / ".workers.lock", "a") as workers:
        return _acquire(workers.fileno(), patience)


def hold_worker_lock(run_dir: Path) -> int:
    """Show, as long as this process lives, that it works in `run_dir`; the file descriptor to keep open."""
    descriptor = os.open(run_dir / ".workers.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    except OSError as error:
        if not _unsupported(error):
            raise
    return descriptor


def die_with_parent() -> None:
    """Have the system kill this process when its parent dies, even by `kill -9` (Linux; elsewhere nothing happens)."""
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def outlive_parent_for_workers(run_dir: Path, patience: float) -> None:
    """When its parent dies, let this process group live until no rank is at work in `run_dir` any more, or for
    `patience` seconds, and then kill it."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        wait_for_workers(run_dir, patience)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _acquire(descriptor: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if _unsupported(error):
                return True
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN) or time.monotonic() >= deadline:
                return False
        time.sleep(0.05)


def _unsupported(error: OSError) -> bool:
    """Some network file systems have no locks; a run there goes without."""
    return error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
