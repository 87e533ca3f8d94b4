"""Safetensors files in slices: tensors larger than memory are read and written piece by piece, from many threads.

A file begins with the length of its header (8 bytes, little-endian), the header (JSON: for each tensor its number
format, shape and range of bytes) and then the tensors' bytes. Reading copies into buffers that the caller reuses, so
that resident memory is what the caller holds; pages of a mapped file would count as well. Writing puts the header
first, so that tensors can follow in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.weights.page_cache import give_back, in_memory

MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_METADATA = "__metadata__"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Form:
    """Number format and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.numel * self.dtype.itemsize


class TensorReader:
    """A safetensors file, open for reading slices. Threads may share it.

    Raises WeightsError if the file is missing, cut short, or its header is not exactly what the format allows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be opened ({error.strerror})") from error
        self._foreign = in_memory(self._handle) < 0.5
        try:
            self.header_bytes, header = _read_header(path, self._handle)
            self.forms, self._starts = _check_header(path, header, os.fstat(self._handle).st_size - self.header_bytes)
        except BaseException:
            self.close()
            raise

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n], contiguous and of the tensor's format, with elements start … start + n of tensor `name`."""
        form = self.forms[name]
        if out.dtype != form.dtype or start < 0 or start + out.numel() > form.numel:
            raise ValueError(f"{name}: {out.numel()} of {out.dtype} from {start} on are not in {form}")
        offset = self.header_bytes + self._starts[name] + start * form.dtype.itemsize
        view = raw_bytes(out)
        while view:
            count = os.preadv(self._handle, [view], offset)
            if count == 0:
                raise WeightsError(f"{self.path}: ends within tensor {name}; it was cut while it was read")
            view, offset = view[count:], offset + count

    def forget(self, name: str) -> None:
        """The tensor `name` need not stay in memory, unless much of the file was there when it was opened."""
        if self._foreign:
            give_back(self._handle, self.header_bytes + self._starts[name], self.forms[name].nbytes)

    def close(self) -> None:
        """Close the file; nothing can be read any more."""
        if self._handle >= 0:
            if self._foreign:
                give_back(self._handle, 0, os.fstat(self._handle).st_size)  # what lies across the ends of tensors
            os.close(self._handle)
            self._handle = -1

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TensorWriter:
    """A safetensors file of known tensors, whose room is reserved and whose header is written at once.

    Threads may share it. Raises OSError if there is no room.
    """

    def __init__(self, path: Path, forms: Mapping[str, Form]) -> None:
        self.path = path
        self.forms = dict(forms)
        # Larger elements first: every tensor then begins at a multiple of its element's size.
        order = sorted(forms, key=lambda name: (-forms[name].dtype.itemsize, name))
        header: dict[str, Any] = {_METADATA: {"format": "pt"}}
        self._starts: dict[str, int] = {}
        end = 0
        for name in order:
            self._starts[name], end = end, end + forms[name].nbytes
            header[name] = {
                "dtype": _NAMES[forms[name].dtype],
                "shape": list(forms[name].shape),
                "data_offsets": [self._starts[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.posix_fallocate(self._handle, 0, len(self.header) + end)
            _write(self._handle, memoryview(self.header), 0)
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put `values` [n], contiguous and of the tensor's format, in place of elements start … start + n."""
        form = self.forms[name]
        if values.dtype != form.dtype or start < 0 or start + values.numel() > form.numel:
            raise ValueError(f"{name}: {values.numel()} of {values.dtype} from {start} on do not fit into {form}")
        offset = len(self.header) + self._starts[name] + start * form.dtype.itemsize
        _write(self._handle, raw_bytes(values), offset)

    def begin_sync(self, name: str) -> None:
        """The tensor `name` is written: let it go to disk now, while others are being made."""
        give_back(self._handle, len(self.header) + self._starts[name], self.forms[name].nbytes)

    def close(self, sync: bool = True) -> None:
        """Close the file, by default after forcing it to disk."""
        try:
            if sync:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    content: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(content)


def _write(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view, offset)
        view, offset = view[count:], offset + count


def _read_header(path: Path, handle: int) -> tuple[int, dict[str, Any]]:
    """(bytes before the tensors, the header)."""
    prefix = os.pread(handle, 8, 0)
    if len(prefix) < 8:
        raise WeightsError(f"{path}: is damaged or cut short ({len(prefix)} bytes); fetch or write it again")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise WeightsError(f"{path}: is no safetensors file: a header of {length} bytes, at most {MAX_HEADER_BYTES}")
    text = os.pread(handle, length, 8)
    if len(text) < length:
        raise WeightsError(f"{path}: is damaged or cut short: {len(text)} of {length} bytes of its header are there")
    try:
        header = json.loads(text, object_pairs_hook=_without_twins)
    except ValueError as error:
        raise WeightsError(f"{path}: its header is not valid JSON ({error}); fetch or write it again") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: its header is a {type(header).__name__}; expected a JSON object")
    return 8 + length, header


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        twin = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twin!r} occurs twice")
    return dict(pairs)


def _check_header(path: Path, header: dict[str, Any], size: int) -> tuple[dict[str, Form], dict[str, int]]:
    """Forms and first bytes of the tensors, which must fill the `size` bytes of data without gap or overlap."""
    forms: dict[str, Form] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        if name != _METADATA:
            forms[name], ranges[name] = _entry(path, name, entry)
    end = 0
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != end:
            found = "overlaps the one before it" if first < end else f"leaves a gap of {first - end} bytes before it"
            raise WeightsError(f"{path}: tensor {name} {found}; the file is damaged")
        end = last
    if end != size:
        raise WeightsError(f"{path}: is damaged or cut short: {size} bytes of tensors, the header promises {end}")
    return forms, {name: first for name, (first, _) in ranges.items()}


def _entry(path: Path, name: str, entry: Any) -> tuple[Form, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(f"{path}: tensor {name}: expected dtype, shape and data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise WeightsError(f"{path}: tensor {name} has the number format {dtype!r}; known: {', '.join(_DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise WeightsError(f"{path}: tensor {name}: shape and data_offsets must be lists of whole numbers from 0")
    form = Form(_DTYPES[dtype], tuple(shape))
    if offsets[1] - offsets[0] != form.nbytes:
        raise WeightsError(
            f"{path}: tensor {name} of {dtype} {shape} takes {form.nbytes} bytes, its range has "
            f"{offsets[1] - offsets[0]}; the file is damaged"
        )
    return form, (offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
