"""The hand-over of weights to servers: bucket by bucket, all servers at a time, and counted only when it is checked.

    pause (running requests go back to the queue) · begin · bucket, bucket, … · end · flush the prefix cache ·
    name the version · check · continue

Without the flush, cached keys and values of old weights would serve new ones. A server in which any of this fails is
lost (pool.py): it is never asked with weights that nobody can name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import torch

from copd_megatron.rollout.engine import EngineLost
from copd_megatron.rollout.sglang import background
from copd_megatron.rollout.sglang.client import EngineRefused, HungServer, Server, ServerLost
from copd_megatron.rollout.sglang.pool import Pool
from copd_megatron.rollout.sglang.transport import STEP_SECONDS, Bucket, Transport, succeeded
from copd_megatron.rollout.sglang.wire import BadReply


def hand_over(pool: Pool, named: Iterable[tuple[str, torch.Tensor]], label: str, transport: Transport) -> None:
    """Give the Hugging Face named tensors to the servers of `pool`, which call them `label` from then on.

    `named` is taken to its end in any case. Raises EngineLost if no server has them afterwards, and whatever `named`
    raises.
    """
    update = _Update(pool, transport)
    rest = iter(named)
    try:
        transport.open()
        update.everywhere(_pause)
        update.everywhere(transport.begin)
        for bucket in buckets(rest, transport.bucket_bytes):
            update.send(bucket)
        transport.close()
        update.everywhere(transport.end)
        update.everywhere(_named(label))
        update.check(label)
        update.everywhere(_continue)
    except EngineLost:
        for _ in rest:
            pass
        raise
    finally:
        transport.clear()


def buckets(named: Iterable[tuple[str, torch.Tensor]], size: int) -> Iterator[Bucket]:
    """Tensors in groups of at most `size` bytes each, or of one larger tensor."""
    bucket: Bucket = []
    held = 0
    for name, tensor in named:
        if bucket and held + tensor.nbytes > size:
            yield bucket
            bucket, held = [], 0
        bucket.append((name, tensor))
        held += tensor.nbytes
    if bucket:
        yield bucket


class _Update:
    """One hand-over. Servers that were lost before take part again; those that fail now are lost."""

    def __init__(self, pool: Pool, transport: Transport) -> None:
        self._pool = pool
        self._transport = transport
        for server in pool.servers:
            server.lost = None

    def everywhere(self, step: Callable[[Server], Awaitable[Any]]) -> list[tuple[Server, Any]]:
        """Do `step` in every server that is still there; its answers. Raises EngineLost when none is left."""

        async def guarded(server: Server) -> Any:
            try:
                return await step(server)
            except (ServerLost, BadReply, EngineRefused) as error:
                self._pool.lose(server, f"the hand-over of weights failed: {error}", isinstance(error, HungServer))
                return None

        async def all_of_them(servers: list[Server]) -> list[Any]:
            return await asyncio.gather(*(guarded(server) for server in servers))

        servers = self._pool.usable()
        answers = background.run(all_of_them(servers))
        self._pool.usable()
        return [(server, answer) for server, answer in zip(servers, answers, strict=True) if server.lost is None]

    def send(self, bucket: Bucket) -> None:
        self._transport.load(bucket)
        self.everywhere(self._transport.deliver)

    def check(self, label: str) -> None:
        """All servers must hold the same bytes, also those that get the same weights once more after a restart."""
        sums = {
            server: [rank["checksums"] for rank in answer["ranks"]] for server, answer in self.everywhere(_checksums)
        }
        known = self._pool.checksums.get(label)
        for server, found in sums.items():
            known = known or found
            if len(found) == len(known) and (wrong := _different(found, known)):
                self._pool.lose(server, f"after the hand-over {', '.join(wrong)} are not what other servers hold")
        self._pool.usable()
        if known is not None:
            self._pool.checksums = {label: known}


def _different(found: list[dict[str, str]], known: list[dict[str, str]], shown: int = 3) -> list[str]:
    """Names of tensors in which two servers of the same layout differ."""
    return [
        name
        for mine, other in zip(found, known, strict=True)
        for name in sorted({*mine, *other})
        if mine.get(name) != other.get(name)
    ][:shown]


async def _pause(server: Server) -> None:
    await server.post("/pause_generation", {"mode": "retract"}, STEP_SECONDS)


def _named(label: str) -> Callable[[Server], Awaitable[None]]:
    async def name(server: Server) -> None:
        await server.post("/flush_cache", None, STEP_SECONDS)
        succeeded(
            await server.post(
                "/update_weight_version", {"new_version": label, "abort_all_requests": False}, STEP_SECONDS
            )
        )

    return name


async def _checksums(server: Server) -> Any:
    return succeeded(await server.post("/weights_checker", {"action": "checksum"}, STEP_SECONDS))


async def _continue(server: Server) -> None:
    await server.post("/continue_generation", None, STEP_SECONDS)
