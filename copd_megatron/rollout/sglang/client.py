"""One server and the connection to it: bounded requests in flight, clear errors, nothing logged that is secret."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson

from copd_megatron.errors import CopdError
from copd_megatron.rollout.sglang.wire import BadReply

_CONNECT_SECONDS = 10.0


class EngineRefused(CopdError):
    """A server understood the request and will not serve it; asking again would not help."""


class ServerLost(Exception):
    """The server cannot be reached, or does not answer."""


class HungServer(ServerLost):
    """The server is there and says nothing."""


@dataclass(frozen=True)
class Limits:
    """Bounds of what is asked of one server."""

    in_flight: int = 128
    """Requests at a time; the others wait here."""
    request_seconds: float = 1800.0
    """Longest wait for one answer."""
    hang_seconds: float = 60.0
    """Longest silence of a server that owes answers before it is asked for its health, and the wait for that."""


@dataclass(eq=False)
class Server:
    """One SGLang server at `url`, with the key that it wants, as this process sees it."""

    url: str
    key: str | None
    limits: Limits
    lost: str | None = None
    """Why it is not asked any more, until it has been given weights again."""
    hung: bool = False
    """Whether it was lost because it said nothing any more."""
    heard: float = 0.0
    """When it answered last (`time.monotonic`)."""
    lost_since_joined: bool = False
    """Whether it was lost since it joined a process group (broadcast.py)."""
    waiting: int = 0
    """Requests that are under way or queued for it."""
    tensor_parallel: int | None = None
    """Its tensor-parallel size, once it has been asked."""
    sent: int = 0
    received: int = 0
    """Bytes of bodies."""
    _session: aiohttp.ClientSession | None = None
    _slots: asyncio.Semaphore = field(init=False)
    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.limits.in_flight)

    async def post(self, path: str, body: dict[str, Any] | None = None, seconds: float | None = None) -> Any:
        """The JSON answer. Raises ServerLost, BadReply (may be asked again) or EngineRefused."""
        self.waiting += 1
        try:
            async with self._slots:
                return await self._exchange("POST", path, body or {}, seconds or self.limits.request_seconds)
        finally:
            self.waiting -= 1

    async def post_watched(self, path: str, body: dict[str, Any]) -> Any:
        """As `post`, but a server that hangs is told from one that takes long. Raises HungServer too."""
        answer = asyncio.ensure_future(self.post(path, body))
        try:
            while not (await asyncio.wait([answer], timeout=self.limits.hang_seconds))[0]:
                if not await self._speaks():
                    raise HungServer(f"{self.url}: silent for {self.limits.hang_seconds:g} s, and then unhealthy")
            return await answer
        finally:
            answer.cancel()

    async def healthy(self, seconds: float = 20.0) -> bool:
        """Whether it generates a token, or is generating some."""
        try:
            await self.get("/health_generate", seconds)
        except (BadReply, ServerLost):
            return False
        return True

    async def _speaks(self) -> bool:
        """Whether it has answered anybody of late, or does now; asked once for all who wait for it."""
        async with self._checking:
            if time.monotonic() - self.heard < self.limits.hang_seconds:
                return True
            return await self.healthy(self.limits.hang_seconds)

    async def get(self, path: str, seconds: float) -> Any:
        """The JSON answer to a question without a body; it does not queue. Raises as `post`."""
        return await self._exchange("GET", path, None, seconds)

    async def close(self) -> None:
        """End the connections."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None, seconds: float) -> Any:
        if self._session is None:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            # No redirects are followed and no proxy is read from the environment: the key goes to this address alone.
            # Servers close connections that were idle for five seconds: one must not be used in that very moment.
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, keepalive_timeout=2.0)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers)
        data = None if body is None else orjson.dumps(body)
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=_CONNECT_SECONDS)
        self.sent += len(data or b"")
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=data,
                headers={"Content-Type": "application/json"} if data else None,
                timeout=timeout,
                allow_redirects=False,
            ) as response:
                content = await response.read()
                status = response.status
        except TimeoutError as error:
            raise HungServer(f"{self.url}{path}: no answer within {seconds:g} s") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, OSError) as error:
            raise ServerLost(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        self.heard = time.monotonic()
        self.received += len(content)
        return self._answer(path, status, content)

    def _answer(self, path: str, status: int, content: bytes) -> Any:
        excerpt = content[:500].decode(errors="replace")
        if status in (401, 403):
            raise EngineRefused(
                f"{self.url}{path}: HTTP {status}: the server wants another API key; give the one that it was started "
                "with (rollout.sglang.api_key_file, or the environment variable COPD_SGLANG_API_KEY)"
            )
        if 300 <= status < 500 and status != 429:
            raise EngineRefused(f"{self.url}{path}: HTTP {status}: {excerpt}")
        if status != 200:
            raise BadReply(f"{self.url}{path}: HTTP {status}: {excerpt}")
        if not content:
            return None
        try:
            return orjson.loads(content)
        except orjson.JSONDecodeError as error:
            if path in ("/health", "/health_generate", "/flush_cache"):
                return None  # they answer in plain words
            raise BadReply(f"{self.url}{path}: not JSON: {error}: {excerpt[:100]!r}") from error
