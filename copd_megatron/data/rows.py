"""Rows of a data set by key, and those of a JSONL file. Nothing is held in memory but where the rows are."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import orjson

from copd_megatron.data.media import Folders
from copd_megatron.data.row import BadRow
from copd_megatron.errors import DataError

_LONGEST_LINE = 64 * 2**20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Rows(Protocol):
    """Rows that are known by a key."""

    folders: Folders

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        """Every key with its row, or with what is wrong with it, in order; images may be `Unread`."""
        ...

    def read(self, key: int) -> dict[str, Any]:
        """One row in full."""
        ...

    def where(self, key: int) -> str:
        """The row's place, for messages."""
        ...

    def uid(self, key: int) -> str:
        """A short name of the row that stays the same from run to run."""
        ...


class JsonlRows:
    """One JSON object per line; a row's key is its line number. Empty lines do not count as rows."""

    def __init__(self, path: Path) -> None:
        self.folders = Folders(base=path.parent)
        self._path = path
        self._starts = array("q")
        self._stamp = _stamp(os.stat(path))

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        del self._starts[:]
        with open(self._path, "rb") as file:
            start = 0
            while line := file.readline(_LONGEST_LINE + 1):
                self._starts.append(start)
                start += len(line)
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{self.where(len(self._starts))}: longer than {_LONGEST_LINE} bytes")
                if line.strip():
                    yield len(self._starts), _parsed(line)

    def read(self, key: int) -> dict[str, Any]:
        with open(self._path, "rb") as file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise DataError(f"{self._path} was changed while it was in use; start again")
            file.seek(self._starts[key - 1])
            row = _parsed(file.readline(_LONGEST_LINE))
        if isinstance(row, BadRow):
            raise row
        return row

    def where(self, key: int) -> str:
        return f"{self._path}, line {key}"

    def uid(self, key: int) -> str:
        return f"{self._path.name}:{key}"


def _parsed(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = orjson.loads(line.removeprefix(_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        return BadRow("json", f"not valid JSON: {error}; expected one object per line, found {line[:60]!r}")
    if not isinstance(row, dict):
        return BadRow("json", f"expected one JSON object per line, found {line[:60]!r}")
    return row


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns
