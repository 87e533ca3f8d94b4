"""One event loop in a thread of its own, for everything that this process asks of servers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import cache
from typing import Any, TypeVar

Result = TypeVar("Result")


@cache
def loop() -> asyncio.AbstractEventLoop:
    """The running loop; started when it is first asked for."""
    started = asyncio.new_event_loop()
    threading.Thread(target=started.run_forever, name="sglang-client", daemon=True).start()
    return started


def submit(work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Begin `work`; from any thread, the loop's own included."""
    return asyncio.run_coroutine_threadsafe(work, loop())


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Do `work` and return its result; not to be called from the loop's own thread."""
    future = submit(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
