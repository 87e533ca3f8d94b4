"""A proxy in front of a real server that spoils some of its answers."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

from aiohttp import ClientSession, web

from copd_megatron.rollout.sglang import background


class FaultyProxy:
    """Passes everything on to `target`; answers of `path` are spoiled as `plan` says, first entry first.

    500: an error of the server · reset: the connection ends before an answer · cut: it ends in the middle of one ·
    hang: no answer · slow: one after six seconds · garbage: no JSON · short: the last token is missing · nan: a
    log-probability is NaN · other: the tokens are others · deaf: neither images nor videos were seen
    """

    def __init__(self, target: str) -> None:
        self.plan: list[str] = []
        self.silent = False
        """Whether nothing is answered, whatever the path."""
        self.path = "/generate"
        self.seen: Counter[str] = Counter()
        self._target = target
        self.url = background.run(self._start())

    async def _start(self) -> str:
        self._session = ClientSession()
        application = web.Application(client_max_size=1 << 28)
        application.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def close(self) -> None:
        async def close() -> None:
            await self._runner.cleanup()
            await self._session.close()

        background.run(close())

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.seen[request.path] += 1
        fault = self.plan.pop(0) if self.plan and request.path == self.path else ""
        if fault == "500":
            return web.Response(status=500, text="Internal Server Error")
        if fault == "hang" or self.silent:
            await asyncio.sleep(3600)
        if fault == "slow":
            await asyncio.sleep(6)
            fault = ""
        if fault == "reset":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type") if name in request.headers}
        async with self._session.request(
            request.method, self._target + request.path_qs, data=await request.read(), headers=headers
        ) as answer:
            status, content = answer.status, await answer.read()
        if fault == "garbage":
            content = b"<html>busy</html>"
        elif fault == "cut":
            response = web.StreamResponse(status=status, headers={"Content-Length": str(len(content))})
            await response.prepare(request)
            await response.write(content[: len(content) // 2])
            assert request.transport is not None
            request.transport.abort()
            return response
        elif fault:
            content = spoiled(content, fault)
        return web.Response(status=status, body=content, content_type="application/json")


def spoiled(content: bytes, fault: str) -> bytes:
    """A reply of `/generate` with the fault in it."""
    reply = json.loads(content)
    meta = reply["meta_info"]
    rows: list[Any] = meta["output_token_logprobs"] or meta["input_token_logprobs"]
    if fault == "short":
        rows.pop()
    elif fault == "nan":
        rows[-1][0] = float("nan")
    elif fault == "other":
        rows[-1][1] += 1
    elif fault == "deaf":
        meta["image_tokens"] = meta["video_tokens"] = 0
    else:
        raise ValueError(fault)
    return json.dumps(reply).replace("NaN", "null").encode()
