"""The time in which a branch's engine must keep its weights, and what happens when an engine loses them meanwhile.

A branch may change its engine's weights only when no peer asks it any more. So work that asks peers' engines ends with
a point that every branch reaches; until then each of them stands by to hand its engine the same weights once more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Set
from typing import Literal

from copd_megatron.exchange import Exchange

log = logging.getLogger(__name__)

Order = Literal["try", "wait", "renew", "stop", "leave"]
"""What the gang does next: the work (again), nothing, hand its engine the weights again, save and end, go on."""

_PAUSE = 0.02


class Window:
    """Rank 0's view of one piece of work before update `step`; it ends at `point`, or at once without one."""

    def __init__(self, exchange: Exchange, point: str | None, step: int, wait_seconds: float) -> None:
        self._exchange = exchange
        self._point = point
        self._step = step
        self._wait_seconds = wait_seconds
        self._tickets: dict[str, int] = {}
        self._granting: int | None = None
        self._deadline = float("inf")
        self._reason: str | None = None

    def order(self, lost: Set[str], done: bool) -> tuple[Order, str | None]:
        """What to do when the gang's last attempt has lost the engines of the branches `lost`, or is `done`; and why,
        if that is to stop for the sake of an engine.

        Raises PeerLost if a peer is gone.
        """
        return self._order(lost, done), self._reason

    def _order(self, lost: Set[str], done: bool) -> Order:
        exchange = self._exchange
        if self._granting is not None:  # the order before this one was to renew, for peers
            exchange.renewed_for(self._granting)
            self._granting = None
        if exchange.stopping(self._step):
            return "stop"
        self._granting = exchange.renewal_asked()
        if exchange.me in lost or self._granting is not None:
            return "renew"
        for peer in lost & set(exchange.peers) - self._tickets.keys():
            log.warning("the engine of %s has lost its weights; asking for them", peer)
            self._tickets[peer] = exchange.ask_renewal(peer)
            self._deadline = min(self._deadline, time.monotonic() + self._wait_seconds)
        if self._tickets:
            if all(exchange.renewed(peer, ticket) for peer, ticket in self._tickets.items()):
                self._tickets, self._deadline = {}, float("inf")
                return "try"
            if time.monotonic() > self._deadline:
                names = ", ".join(sorted(self._tickets))
                self._reason = (
                    f"the engine of {names} did not come back within {self._wait_seconds:g} s (teacher.wait_seconds)"
                )
                exchange.stop_before(self._step)
                return "stop"
            time.sleep(_PAUSE)
            return "wait"
        if not done:
            return "try"
        if self._point is None or exchange.together(self._point):
            return "leave"
        time.sleep(_PAUSE)
        return "wait"
