"""How weights travel to a server: what all ways have in common."""

from __future__ import annotations

from typing import Any

import torch

from copd_megatron.rollout.sglang.client import EngineRefused, Server
from copd_megatron.rollout.sglang.wire import BadReply

Bucket = list[tuple[str, torch.Tensor]]

STEP_SECONDS = 300.0
"""Longest wait for one step of a hand-over."""


class Transport:
    """A way of weights to servers, bucket by bucket. Methods raise BadReply, ServerLost or EngineRefused.

    One hand-over: `open`, `begin` (per server); for every bucket `load`, `deliver` (per server); `close`, `end` (per
    server); `clear`, also after a failure. What is done per server runs side by side.
    """

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = bucket_bytes

    def open(self) -> None:
        """A hand-over begins."""

    async def begin(self, server: Server) -> None:
        """Get `server` ready for new weights."""
        try:
            succeeded(await server.post("/begin_weight_update", None, STEP_SECONDS))
        except EngineRefused:  # an earlier hand-over has not come to its end
            succeeded(await server.post("/end_weight_update", None, STEP_SECONDS))
            succeeded(await server.post("/begin_weight_update", None, STEP_SECONDS))

    def load(self, bucket: Bucket) -> None:
        """Make `bucket` ready; what was loaded before it has been delivered everywhere."""
        raise NotImplementedError

    async def deliver(self, server: Server) -> None:
        """Give the loaded bucket to `server`."""
        raise NotImplementedError

    def close(self) -> None:
        """That was the last bucket."""

    async def end(self, server: Server) -> None:
        """Have `server` take what it was given."""
        succeeded(await server.post("/end_weight_update", None, STEP_SECONDS))

    def clear(self) -> None:
        """No server reads what was made ready any more."""


async def tensor_parallel(server: Server) -> int:
    """The server's tensor-parallel size."""
    if server.tensor_parallel is None:
        info = await server.get("/server_info", STEP_SECONDS)
        try:
            server.tensor_parallel = int(info["tp_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise BadReply(f"{server.url}/server_info names no tp_size") from error
    return server.tensor_parallel


def succeeded(answer: Any) -> Any:
    """`answer` if the server says that it did what was asked. Raises BadReply."""
    if not isinstance(answer, dict) or not answer.get("success"):
        raise BadReply(f"the server answered {str(answer)[:300]}")
    return answer
