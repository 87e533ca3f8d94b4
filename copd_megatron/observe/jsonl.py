"""Files of one JSON object per line, appended to while a run lives and cut back when it resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from copd_megatron.errors import CopdError
from copd_megatron.files import write_atomic

Line = dict[str, Any]


def encode(line: Line) -> str:
    """One line with its newline. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False) + "\n"


def read_lines(path: str | os.PathLike[str]) -> list[Line]:
    """All complete lines; none where the file is absent.

    A last line without its newline was cut short by a killed writer and is left out. Raises CopdError for any other
    line that is not a JSON object.
    """
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    lines = []
    for number, raw in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            line = json.loads(raw)
        except ValueError as error:
            raise CopdError(
                f"{path}, line {number}: expected one JSON object, found {_shortened(raw)} ({error}); "
                "remove that line to go on"
            ) from error
        if not isinstance(line, dict):
            raise CopdError(f"{path}, line {number}: expected a JSON object, found {_shortened(raw)}; remove that line")
        lines.append(line)
    return lines


def keep_lines(path: str | os.PathLike[str], wanted: Callable[[Line], bool]) -> list[Line]:
    """Rewrite the file, whole or not at all, with the lines that are `wanted`; return those.

    A line that was cut short goes too. A file that needs no change, or is absent, is not touched.
    """
    kept = [line for line in read_lines(path) if wanted(line)]
    content = "".join(map(encode, kept)).encode()
    if os.path.exists(path) and Path(path).read_bytes() != content:
        write_atomic(path, content)
    return kept


class LineWriter:
    """Appends lines; each reaches the operating system before `append` returns, so a killed process loses none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(self.path)
        self._file = self._open()

    def append(self, line: Line) -> None:
        """Write one line."""
        self._file.write(encode(line).encode())
        self._file.flush()

    def keep(self, wanted: Callable[[Line], bool]) -> list[Line]:
        """Drop the lines that are not `wanted`, whole or not at all; return the others."""
        self._file.close()
        try:
            return keep_lines(self.path, wanted)
        finally:
            self._file = self._open()

    def sync(self) -> None:
        """Make everything written so far survive a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to disk and close."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _open(self) -> BinaryIO:
        return open(self.path, "ab")


def _drop_cut_line(path: Path) -> None:
    """Appending after half a line would spoil the next one as well."""
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete != len(content):
            write_atomic(path, content[:complete])


def _shortened(raw: bytes) -> str:
    text = raw.decode(errors="replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")
