"""Weights through memory that this process and servers of the same machine share."""

from __future__ import annotations

import base64
import io
import math
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing

from copd_megatron.rollout.sglang.client import Server
from copd_megatron.rollout.sglang.transport import STEP_SECONDS, Bucket, Transport, succeeded, tensor_parallel

_ALIGNMENT = 64


class SharedMemory(Transport):
    """On a CPU a piece of shared memory that is used again for every bucket, on a GPU the tensors' own memory
    (CUDA IPC)."""

    def __init__(self, bucket_bytes: int) -> None:
        super().__init__(bucket_bytes)
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._bucket: Bucket = []

    def load(self, bucket: Bucket) -> None:
        if bucket[0][1].is_cuda:
            from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

            monkey_patch_torch_reductions()  # devices are named by their UUID: the server may number them otherwise
            self._bucket = bucket
            return
        # The server is no child of this process, so it cannot be passed a file descriptor: it opens a name.
        torch.multiprocessing.set_sharing_strategy("file_system")
        total = sum(_padded(tensor.nbytes) for _, tensor in bucket)
        if self._memory.nbytes < total:
            self._memory = torch.empty(total, dtype=torch.uint8).share_memory_()
        self._bucket = []
        place = 0
        for name, tensor in bucket:
            view = self._memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            view.copy_(tensor)
            self._bucket.append((name, view))
            place += _padded(tensor.nbytes)

    async def deliver(self, server: Server) -> None:
        """Each receiver gets handles of its own: opening one gives its share of the memory back."""
        handles = [_pickled(self._bucket) for _ in range(await tensor_parallel(server))]
        body = {"serialized_named_tensors": handles, "flush_cache": False}
        succeeded(await server.post("/update_weights_from_tensor", body, STEP_SECONDS))


def _pickled(bucket: Bucket) -> str:
    """Handles of the tensors' memory. This is the server's own format, which it reads with an allow-list."""
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump([(name, tensor.detach()) for name, tensor in bucket])
    return base64.b64encode(buffer.getvalue()).decode()


def _padded(size: int) -> int:
    return math.ceil(size / _ALIGNMENT) * _ALIGNMENT
