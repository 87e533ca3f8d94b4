"""Merging tensors, one thread each, into shards that are on disk when their last tensor is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor

from copd_megatron.errors import WeightsError
from copd_megatron.randomness import generator
from copd_megatron.weights.hf_shards import Shard
from copd_megatron.weights.merge.measure import measure
from copd_megatron.weights.merge.methods import METHODS, Terms
from copd_megatron.weights.merge.partial import PartialFolder
from copd_megatron.weights.merge.recipe import Recipe
from copd_megatron.weights.merge.sources import Source, WholeSource
from copd_megatron.weights.merge.stream import CHUNK, NotFinite, Stream, Workspace, order_of
from copd_megatron.weights.progress import Progress
from copd_megatron.weights.tensor_files import TensorWriter, raw_bytes


@dataclass(frozen=True)
class Merge:
    """What is merged and how. `measured`: also compare the inputs with the base and with each other."""

    base: Source
    inputs: Sequence[Source]
    recipe: Recipe
    measured: bool = False
    chunk: int = CHUNK

    @cached_property
    def order(self) -> Mapping[str, int]:
        """The place of each tensor in the order in which reading them is cheapest."""
        whole = next((source for source in self.inputs if isinstance(source, WholeSource)), self.inputs[0])
        return {name: place for place, name in enumerate(whole.names())}


def write_shards(
    merge: Merge,
    shards: Sequence[Shard],
    folder: PartialFolder,
    progress: Progress,
    jobs: int,
    go_on: Callable[[], None] = lambda: None,
) -> None:
    """Write shards into `folder` with `jobs` threads. The first error of a thread stops the others and is raised.

    `go_on` is called often, from any thread, and raises to stop the work.
    """
    stop = threading.Event()

    def proceed() -> None:
        if stop.is_set():
            raise _Stopped
        go_on()

    def work(shard: _OpenShard, name: str) -> None:
        try:
            proceed()
            shard.take(name, lambda writer: _write_tensor(merge, name, writer, workspace(), progress.done, proceed))
        except BaseException:
            stop.set()
            raise

    open_shards = [_OpenShard(shard, folder, progress) for shard in shards]
    try:
        with merging_threads(jobs, merge.chunk) as (pool, workspace):
            try:
                tasks: list[Future[None]] = [
                    pool.submit(work, shard, name)
                    for shard in open_shards
                    for name in sorted(shard.shard.forms, key=merge.order.__getitem__)
                ]
                wait(tasks, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
    finally:
        for shard in open_shards:
            shard.abandon()
    # Only now: a thread that was stopped can have ended before the one whose error stopped it.
    errors = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, _Stopped)):
        raise error


@contextmanager
def merging_threads(jobs: int, chunk: int) -> Iterator[tuple[ThreadPoolExecutor, Callable[[], Workspace]]]:
    """Yield `jobs` threads, and what gives each its buffers. Torch computes within the thread that calls it."""
    threads = torch.get_num_threads()
    own = threading.local()

    def prepare() -> None:
        torch.set_num_threads(1)
        own.workspace = Workspace(chunk)

    pool = ThreadPoolExecutor(jobs, "merge", prepare)
    try:
        yield pool, lambda: own.workspace
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class _Stopped(Exception):
    """Another thread has failed."""


class _OpenShard:
    """A shard on its way: opened with its first tensor, recorded with its last."""

    def __init__(self, shard: Shard, folder: PartialFolder, progress: Progress) -> None:
        self.shard = shard
        self._folder = folder
        self._progress = progress
        self._lock = threading.Lock()
        self._writer: TensorWriter | None = None
        self._records: dict[str, Any] = {}

    def take(self, name: str, write: Callable[[TensorWriter], dict[str, Any]]) -> None:
        """Have `write` write the tensor `name` and keep what it returns."""
        with self._lock:
            if self._writer is None:
                self._writer = TensorWriter(self._folder.path / self.shard.file, self.shard.forms)
            writer = self._writer
        record = write(writer)
        with self._lock:
            self._records[name] = record
            if len(self._records) < len(self.shard.forms):
                return
            self._writer = None
        writer.close(sync=True)
        self._folder.record(self.shard, self._records)
        self._progress.file(self.shard.file, self.shard.nbytes)

    def abandon(self) -> None:
        """Close the file if it is not finished."""
        if self._writer is not None:
            self._writer.close(sync=False)
            self._writer = None


def _write_tensor(
    merge: Merge,
    name: str,
    writer: TensorWriter,
    workspace: Workspace,
    written: Callable[[int], None],
    go_on: Callable[[], None],
) -> dict[str, Any]:
    """Merge the tensor `name` into a file; returns its checksum and what `merge_tensor` tells."""
    summed = xxhash.xxh3_64()

    def put(start: int, values: Tensor) -> None:
        writer.write(name, start, values)
        view = raw_bytes(values)
        summed.update(view)
        written(len(view))

    facts = merge_tensor(merge, name, workspace, put, go_on)
    writer.begin_sync(name)
    return {"xxh3": summed.hexdigest(), **facts}


def merge_tensor(
    merge: Merge, name: str, workspace: Workspace, put: Callable[[int, Tensor], None], go_on: Callable[[], None]
) -> dict[str, Any]:
    """Merge the tensor `name`. `put` takes its slices: the first element's number, and values [n] in the base's format
    which are valid until it returns. Returns `measured`, if asked for."""
    dtype = merge.base.form(name).dtype
    stream = Stream(name, merge.base, merge.inputs, workspace, go_on)
    averaged = dtype.is_floating_point
    start = 0
    try:
        for values in _merged(merge, stream) if averaged else _same(stream):
            put(start, _rounded(stream, values, dtype) if averaged else values)
            start += values.numel()
        return {"measured": measure(stream)} if merge.measured and averaged else {}
    except NotFinite:
        raise _explanation(stream) from None
    finally:
        for source in (merge.base, *merge.inputs):
            source.forget(name)


def _merged(merge: Merge, stream: Stream) -> Iterator[Tensor]:
    """Slices float32 of the merged tensor."""
    if stream.numel == 0:
        return iter(())
    recipe = merge.recipe
    weights = recipe.weights_of(stream.name, len(merge.inputs))
    order = order_of(stream, weights)
    ordered = Stream(stream.name, stream.base, [merge.inputs[index] for index in order], stream.workspace, stream.go_on)
    chances = [generator(recipe.seed, "merge", stream.name, index) for index in order] if recipe.chance else []
    terms = Terms([weights[index] for index in order], recipe.divides, recipe.kept, recipe.factor, chances)
    return METHODS[recipe.method](ordered, terms)


def _rounded(stream: Stream, values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in the base's format. Raises NotFinite if they do not fit into it, or are not finite themselves."""
    result = values if dtype == torch.float32 else stream.buffer("rounded", len(values), dtype).copy_(values)
    # The sum of squares is as large as the largest square, and much cheaper to take than a look at each value.
    largest = float(torch.dot(values, values))
    if not largest < min(1e38, (torch.finfo(dtype).max / 2) ** 2) and not bool(result.isfinite().all()):
        raise NotFinite(f"tensor {stream.name}: merged values are not finite")
    return result


def _same(stream: Stream) -> Iterator[Tensor]:
    """Slices of a tensor of integers or booleans, which cannot be averaged and must be the same everywhere."""
    name, base = stream.name, stream.base
    dtype = base.form(name).dtype
    first = stream.inputs[0]
    for source in stream.inputs:
        if source.form(name).dtype != dtype:
            raise WeightsError(f"{source.label}: tensor {name} is {source.form(name).dtype}, in the base it is {dtype}")
    for chunk in stream:
        expected, found = (stream.buffer(use, chunk.size, dtype) for use in ("expected", "found"))
        first.read(name, chunk.start, expected)
        for source in stream.inputs[1:]:
            source.read(name, chunk.start, found)
            if not torch.equal(found, expected):
                raise WeightsError(
                    f"{source.label}: tensor {name} is {dtype} in the base, which cannot be averaged, "
                    f"and differs here from {first.label}"
                )
        yield expected


def _explanation(stream: Stream) -> WeightsError:
    """Why merging a tensor gave NaN or infinity: because a model holds such values, or because they do not fit."""
    for chunk in stream:
        if not bool(chunk.base().isfinite().all()):
            return _sick(stream.base, stream.name)
        for index, source in enumerate(stream.inputs):
            if not bool(chunk.input(index).isfinite().all()):
                return _sick(source, stream.name)
    dtype = stream.base.form(stream.name).dtype
    return WeightsError(f"tensor {stream.name}: the merged values do not fit into the base's {dtype}")


def _sick(source: Source, name: str) -> WeightsError:
    return WeightsError(f"{source.label}: tensor {name} holds NaN or infinite values; that training went wrong")
