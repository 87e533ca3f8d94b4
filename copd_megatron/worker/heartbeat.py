"""A rank's sign of life, in a thread of its own: it beats also while the rank computes, loads or waits for others."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

from torch.distributed import DistError, Store

from copd_megatron.exchange import beat_key, dump_key, reach, refusal_key

BEAT_SECONDS = 2.0
_LOST_SECONDS = 300.0
"""Without an answer of the store for this long a rank ends: conductor and store may both be gone without a word."""


class Heartbeat:
    """Beats through the run's store, and prints what the rank is doing when the conductor asks for it.

    Without the store no rank can go on, nor can it end in order: the process ends at once.
    """

    def __init__(self, store: Store, branch: str, rank: int) -> None:
        self._store = store
        self._branch = branch
        self._rank = rank
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def refuse(self, reason: str) -> None:
        """Tell the conductor why the run cannot go on, which starting again would not change."""
        self._store.set(refusal_key(self._branch), reason)

    def _beat(self) -> None:
        answered, pause = 0, threading.Event()
        for count in range(sys.maxsize):
            faulthandler.dump_traceback_later(_LOST_SECONDS, exit=True)
            try:
                self._store.set(beat_key(self._branch, self._rank), str(count))
                asked = self._store.add(dump_key(self._branch), 0)
            except DistError as error:
                print(f"rank {self._rank} ends: the run's store is gone ({error})", file=sys.stderr, flush=True)
                os._exit(1)
            if asked > answered:
                answered = asked
                print(f"rank {self._rank} of branch {self._branch}, what it is doing:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
            pause.wait(BEAT_SECONDS)


def connect(host: str, port: int, branch: str, rank: int) -> Heartbeat:
    """The heartbeat of this process, over a connection of its own: another may be waiting for an answer."""
    return Heartbeat(reach(host, port), branch, rank)
