"""A Megatron distributed checkpoint ("torch_dist") from Hugging Face tensors, row by row.

What is written is what megatron-core's dist_checkpointing would save of the model: the same entries in the same parts,
which any layout can load. Neither the model nor a process group of Megatron's is made. Several processes share the rows
of the table; each writes files of its own, and the first the index of all.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import IO, cast

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemWriter, Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from copd_megatron.errors import WeightsError
from copd_megatron.files import write_atomic
from copd_megatron.policy.manifest import Files, describe, write_manifest
from copd_megatron.weights.crew import Crew
from copd_megatron.weights.form import ModelForm, joined_shape
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.sharded import Place, places

INDEX = ".metadata"
FILE_BYTES = 4 * 2**30
"""A process begins another file when one has become so large."""
MAPPED_BYTES = 2**28
"""How much of the mapped files of the source may stay in memory."""


@dataclass(frozen=True)
class Record:
    """A full Megatron tensor that is to be written."""

    place: Place
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What it takes on disk. Nothing if it is another tensor's twin (tied embeddings)."""
        return prod(self.shape) * self.dtype.itemsize if self.place.entry.row.exported else 0

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that make it."""
        return self.place.entry.hf if self.nbytes else ()

    def parts(self) -> Iterator[tuple[MetadataIndex, ChunkStorageMetadata, tuple[slice, ...]]]:
        """The parts in which it is kept: name, place in the checkpoint's tensor, and place in this one."""
        place = self.place
        for offsets, sizes in place.chunks(self.shape) if self.nbytes else ():
            chunk = ChunkStorageMetadata(
                torch.Size((*place.index, *offsets)), torch.Size((1,) * len(place.index) + sizes)
            )
            where = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            yield MetadataIndex(place.key, chunk.offsets), chunk, where


Rows = Callable[[Sequence[Record]], Iterator[tuple[Record, list[torch.Tensor]]]]
"""From records to each of them with its Hugging Face tensors, one after the other."""


def rows_of(source: HfFolder) -> Rows:
    """The tensors of a folder, of whose mapped files no more than `MAPPED_BYTES` stay in memory."""

    def rows(records: Sequence[Record]) -> Iterator[tuple[Record, list[torch.Tensor]]]:
        mapped = 0
        for record in records:
            yield record, [source.tensor(name) for name in record.names]
            mapped += record.nbytes
            if mapped > MAPPED_BYTES:
                source.let_go()
                mapped = 0

    return rows


def plan_records(source: HfFolder, form: ModelForm) -> list[Record]:
    """What the checkpoint of `source` will hold. WeightsError if its tensors are not of the model of `form`."""
    records = []
    for place in places(form.table):
        entry = place.entry
        shapes = {name: tuple(source.shape(name)) for name in entry.hf}
        full = joined_shape(entry, list(shapes.values()))
        if wrong := form.misfit(entry, shapes):
            raise WeightsError(f"{source.path}: is not of the model that config.json describes: {wrong}")
        if full is None:
            raise WeightsError(f"{source.path}: {', '.join(entry.hf)} do not fit each other")
        records.append(Record(place, full, source.dtype(entry.hf[0])))
    return records


def write_checkpoint(
    rows: Rows, records: Sequence[Record], folder: Path, crew: Crew, done: Callable[[int], None]
) -> None:
    """Write `records`, whose tensors are those of `rows`, to the empty `folder`, the manifest last. Collective.

    `done` is told the bytes of each tensor that has been written. WeightsError in every process if one cannot.
    """
    share = [records[number] for number in crew.share([record.nbytes for record in records])]
    own = crew.together(lambda: _write_share(rows(share), folder, crew, done))
    results, files = zip(*crew.gathered(own), strict=True)
    everything = {name: entry for part in files for name, entry in part.items()}
    crew.together(lambda: _finish(folder, records, results, everything) if crew.rank == 0 else None)


def _write_share(
    rows: Iterator[tuple[Record, list[torch.Tensor]]], folder: Path, crew: Crew, done: Callable[[int], None]
) -> tuple[list[WriteResult], Files]:
    """Write one process's files: where everything is, and the files' entries in a manifest."""
    results: list[WriteResult] = []
    files: Files = {}
    row = next(rows, None)
    while row is not None:
        with _summed(folder / f"__{crew.rank}_{len(files)}.distcp") as file:
            while row is not None and file.size < FILE_BYTES:
                crew.check()
                results += _write_record(*row, file)
                done(row[0].nbytes)
                row = None  # its memory is needed for the next
                row = next(rows, None)
        files[file.name] = file.entry()
    return results, files


def _write_record(record: Record, tensors: Sequence[torch.Tensor], file: _Summed) -> Iterator[WriteResult]:
    nothing = _serialised([None])
    for name in record.place.objects():
        start = file.size
        file.write(nothing)
        yield file.result(MetadataIndex(name), start)
    if not record.nbytes:
        return
    full = record.place.entry.row.joint.join(tensors)
    for index, chunk, where in record.parts():
        start = file.size
        # A copy: of a view torch would save all that it is a view of.
        torch.save(full[where].reshape(chunk.sizes).clone(memory_format=torch.contiguous_format), cast(IO[bytes], file))
        yield file.result(index, start)


def _finish(folder: Path, records: Sequence[Record], results: Sequence[Sequence[WriteResult]], files: Files) -> None:
    """Write what lies beside the tensors: index, kind, an empty common state; and the manifest."""
    FileSystemWriter(folder).finish(_index_of(records), [list(part) for part in results])
    write_atomic(folder / COMMON_STATE_FNAME, _serialised({}))
    write_atomic(folder / CONFIG_FNAME, json.dumps(asdict(CheckpointingConfig("torch_dist", 1))))
    small = {name: describe(folder / name) for name in (INDEX, COMMON_STATE_FNAME, CONFIG_FNAME)}
    write_manifest(folder, {**files, **small})


def _index_of(records: Sequence[Record]) -> Metadata:
    """The names of everything in the checkpoint, with the shapes, formats and parts of tensors."""
    found: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for record in records:
        place = record.place
        found |= {name: BytesStorageMetadata() for name in place.objects()}
        for index, chunk, _ in record.parts():
            size = torch.Size((*place.stack, *record.shape))
            stored = found.setdefault(index.fqn, TensorStorageMetadata(TensorProperties(record.dtype), size, []))
            stored.chunks.append(chunk)  # type: ignore[union-attr]
    return Metadata(found)


def _serialised(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Summed:
    """A file that is written from front to end, with its checksum."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self.name = name
        self.size = 0
        self._file = file
        self._sum = hashlib.sha256()

    def write(self, content: bytes) -> int:
        """As a file's."""
        self._sum.update(content)
        self._file.write(content)
        size = memoryview(content).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """As a file's."""
        self._file.flush()

    def entry(self) -> dict[str, object]:
        """In a manifest."""
        return {"bytes": self.size, "sha256": self._sum.hexdigest()}

    def result(self, index: MetadataIndex, start: int) -> WriteResult:
        """Where what has been written since `start` is."""
        length = self.size - start
        return WriteResult(index, length, _StorageInfo(self.name, start, length))


@contextmanager
def _summed(path: Path) -> Iterator[_Summed]:
    with open(path, "xb") as file:
        yield _Summed(path.name, file)
        file.flush()
        os.fsync(file.fileno())
