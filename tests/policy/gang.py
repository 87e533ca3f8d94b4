"""Runs a function in several processes, as torchrun would, and collects what each returns."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as multiprocessing

from copd_megatron.exchange import address, serve
from copd_megatron.supervision.processes import seats


def run(world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240.0) -> list[Any]:
    """`function(*arguments)` in `world` spawned processes with torchrun's environment; results in order of rank.

    `function` must be importable by name. The first failure fails the gang with that process's traceback.
    """
    store = serve()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    place = address(store.host, store.port)
    processes = [
        context.Process(target=_member, args=(queue, rank, {**place, **seat}, function, arguments))
        for rank, seat in enumerate(seats(world))
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in range(world):
            rank, failure, result = queue.get(timeout=timeout)
            assert failure is None, f"rank {rank} of {world} failed:\n{failure}"
            results[rank] = pickle.loads(result)
    finally:
        for process in processes:
            process.join(timeout=10 if len(results) == world else 0.1)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world)]


def _member(
    queue: Any, rank: int, environment: dict[str, str], function: Callable[..., Any], arguments: tuple[Any]
) -> None:
    os.environ.update(environment)
    try:
        result = function(*arguments)
    except BaseException:
        queue.put((rank, traceback.format_exc(), None))
        raise
    queue.put((rank, None, pickle.dumps(result)))
