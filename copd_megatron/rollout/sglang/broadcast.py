"""Weights over process groups: servers on other hosts, or GPUs of this one that cannot share memory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from copd_megatron.exchange import serve
from copd_megatron.rollout.sglang import stand_in
from copd_megatron.rollout.sglang.client import Server
from copd_megatron.rollout.sglang.transport import STEP_SECONDS, Bucket, Transport, succeeded, tensor_parallel


@dataclass(frozen=True)
class _Part:
    """Tensors of one number format, back to back as bytes: `flat` uint8 [bytes], and what a server needs to know."""

    flat: torch.Tensor
    description: dict[str, Any]


class Broadcast(Transport):
    """Rank 0 and one server's ranks form a group, NCCL on GPUs and gloo on CPUs; each server has its own, so that one
    that dies takes no other with it. `address` is where servers reach this process."""

    def __init__(self, bucket_bytes: int, address: str) -> None:
        super().__init__(bucket_bytes)
        self._address = address
        self._groups: dict[Server, tuple[str, dist.ProcessGroup]] = {}
        self._joined = 0
        self._parts: list[_Part] = []

    async def begin(self, server: Server) -> None:
        """A server that was lost may be another process by now: it gets a new group."""
        if server in self._groups and server.lost_since_joined:
            self._groups.pop(server)
        if server not in self._groups:
            self._groups[server] = await self._join(server)
            server.lost_since_joined = False
        await super().begin(server)

    def load(self, bucket: Bucket) -> None:
        formats: dict[torch.dtype, Bucket] = {}
        for name, tensor in bucket:
            formats.setdefault(tensor.dtype, []).append((name, tensor))
        self._parts = [_part(tensors) for tensors in formats.values()]

    async def deliver(self, server: Server) -> None:
        name, group = self._groups[server]
        for part in self._parts:
            body = {**part.description, "group_name": name, "load_format": "flattened_bucket", "flush_cache": False}
            answer = asyncio.create_task(server.post("/update_weights_from_distributed", body, STEP_SECONDS))
            sending = asyncio.create_task(asyncio.to_thread(dist.broadcast, part.flat, 0, group))
            await asyncio.wait([answer, sending], return_when=asyncio.FIRST_EXCEPTION)
            succeeded(await answer)
            await sending

    async def _join(self, server: Server) -> tuple[str, dist.ProcessGroup]:
        if not torch.cuda.is_available():
            stand_in.install()
        from sglang.srt.utils.common import init_custom_process_group

        self._joined += 1
        name = f"copd_{self._joined}"
        store = serve(self._address)
        world = 1 + await tensor_parallel(server)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        body = {
            "master_address": self._address,
            "master_port": store.port,
            "rank_offset": 1,
            "world_size": world,
            "group_name": name,
            "backend": backend,
        }
        answer = asyncio.create_task(server.post("/init_weights_update_group", body, STEP_SECONDS))
        prefixed = dist.PrefixStore(name, store)
        group = await asyncio.to_thread(
            init_custom_process_group, backend=backend, store=prefixed, world_size=world, rank=0, group_name=name
        )
        succeeded(await answer)
        return name, group


def _part(tensors: Iterable[tuple[str, torch.Tensor]]) -> _Part:
    pairs = list(tensors)
    return _Part(
        torch.cat([tensor.detach().contiguous().flatten().view(torch.uint8) for _, tensor in pairs]),
        {
            "names": [name for name, _ in pairs],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in pairs],
            "shapes": [list(tensor.shape) for _, tensor in pairs],
        },
    )
