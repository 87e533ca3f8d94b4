"""The servers of one branch: who is asked, what is asked again, and what is told when none is left."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from copd_megatron.errors import CopdError
from copd_megatron.rollout.engine import EngineLost
from copd_megatron.rollout.sglang.client import HungServer, Server, ServerLost
from copd_megatron.rollout.sglang.wire import BadReply, BlindServer, StaleServer

Result = TypeVar("Result")

_SLACK = 8
"""Requests by which a prompt's own server may be ahead of the least busy one before the prompt goes elsewhere."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Pool:
    """Requests to the servers of `branch`. `counts` tells what went wrong, by metric name."""

    def __init__(self, branch: str, servers: Sequence[Server], attempts: int) -> None:
        self.branch = branch
        self.servers = list(servers)
        self.counts: Counter[str] = Counter()
        self.checksums: dict[str, list[dict[str, str]]] = {}
        """Of the weights handed over last, by their label: tensors' checksums, one mapping per rank of a server."""
        self._attempts = attempts

    async def ask(self, body: dict[str, Any], read: Callable[[Any], Result], affinity: int) -> Result:
        """What `read` makes of the answer of `/generate`.

        Requests with the same `affinity` go to the same server, where their common prefix is cached, unless it is much
        busier than another. A request that fails is sent again, seed and all: it changes nothing in a server. Raises
        EngineLost when no server is left, CopdError for what no server would do.
        """
        failures: list[str] = []
        pause = _FIRST_PAUSE
        for attempt in range(self._attempts):
            if attempt:
                self.counts["retried"] += 1
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            server = self._choose(affinity)
            try:
                return read(await server.post_watched("/generate", body))
            except BlindServer as error:
                raise CopdError(f"{server.url}: {error}") from error
            except StaleServer as error:
                self.lose(server, f"it has the weights {error}, which are not those it was given last")
            except ServerLost as error:
                hung = isinstance(error, HungServer)
                if not await server.healthy():
                    self.lose(server, str(error), hung)
                failures.append(str(error))
            except BadReply as error:
                self.counts["bad_reply"] += 1
                failures.append(f"{server.url}: {error}")
        raise CopdError(
            f"engine of branch {self.branch!r}: {self._attempts} answers in a row could not be used: "
            + "; ".join(dict.fromkeys(failures))
        )

    def lose(self, server: Server, reason: str, hung: bool = False) -> None:
        """Ask `server` no more, for this reason, until it has been given weights."""
        if server.lost is None:
            self.counts["lost"] += 1
            self.counts["hung"] += hung
            server.lost = reason
            server.hung = hung
            server.lost_since_joined = True

    def usable(self) -> list[Server]:
        """The servers that may be asked. Raises EngineLost if there is none."""
        usable = [server for server in self.servers if server.lost is None]
        if not usable:
            raise EngineLost(self.branch, "; ".join(f"{server.url}: {server.lost}" for server in self.servers))
        return usable

    async def reachable(self, seconds: float, every: bool) -> list[Server]:
        """The servers that answer, waiting up to `seconds` for the first of them, or for `every` one."""
        deadline = time.monotonic() + seconds
        while True:
            answers = await asyncio.gather(*(server.healthy() for server in self.servers))
            there = [server for server, answer in zip(self.servers, answers, strict=True) if answer]
            if len(there) == len(self.servers) or (there and not every) or time.monotonic() > deadline:
                return there
            await asyncio.sleep(0.5)

    def _choose(self, affinity: int) -> Server:
        usable = self.usable()
        favourite = usable[affinity % len(usable)]
        idle = min(usable, key=lambda server: server.waiting)
        return favourite if favourite.waiting <= idle.waiting + _SLACK else idle
