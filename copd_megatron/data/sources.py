"""Data sources: a finite, indexable collection of examples from a JSONL file, a Parquet file or a `datasets` data set.

Every row is checked when the source is opened, in one pass that keeps only the rows' places; images and videos are
decoded when an example is taken.
"""

from __future__ import annotations

import difflib
import logging
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from copd_megatron.data.example import Example
from copd_megatron.data.fields import read_record
from copd_megatron.data.media import open_image
from copd_megatron.data.row import BadRow
from copd_megatron.data.rows import JsonlRows, Rows
from copd_megatron.data.settings import SourceSettings
from copd_megatron.data.tables import BUILDERS, open_table
from copd_megatron.data.video import check_decoder, open_video
from copd_megatron.errors import DataError

logger = logging.getLogger(__name__)

_FILE_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}


class Source:
    """Examples by index. `skipped` counts, by reason, the rows that `on_error: skip` left out.

    A row whose image or video turns out to be unusable is counted in `skipped` too, and the next usable example is
    given in its place: the length stays, and so does what every other index means.
    """

    def __init__(self, rows: Rows, settings: SourceSettings) -> None:
        self.skipped: Counter[str] = Counter()
        self._rows = rows
        self._settings = settings
        self._keys = array("q")
        self._unusable: set[int] = set()
        for key, row in rows.scan():
            try:
                if isinstance(row, BadRow):
                    raise row
                read_record(row, settings, rows.folders, uid="")
            except BadRow as error:
                self._leave_out(key, error)
                continue
            self._keys.append(key)
            if len(self._keys) == settings.limit:
                break
        if not self._keys:
            raise DataError(f"{settings.path}: no usable row; skipped: {dict(self.skipped) or 'none, it is empty'}")
        if self.skipped:
            logger.warning("%s: %d rows, skipped %s", settings.path, len(self._keys), dict(self.skipped))

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        """The example with its media. Raises DataError if they cannot be used, unless `on_error` is "skip"."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self._settings.path}: index {index}, expected one below {len(self)}")
        for step in range(len(self)):
            key = self._keys[(index + step) % len(self)]
            if key in self._unusable:
                continue
            try:
                return self._example(key)
            except BadRow as error:
                self._leave_out(key, error)
                self._unusable.add(key)
        raise DataError(f"{self._settings.path}: no usable row is left; skipped: {dict(self.skipped)}")

    def _example(self, key: int) -> Example:
        settings, folders = self._settings, self._rows.folders
        record = read_record(self._rows.read(key), settings, folders, uid=self._rows.uid(key))
        return Example(
            uid=record.uid,
            messages=record.messages,
            answer=record.answer,
            verifier=record.verifier,
            images=tuple(open_image(image, folders, settings.max_pixels) for image in record.images),
            videos=tuple(open_video(video, folders, settings) for video in record.videos),
            response=record.response,
        )

    def _leave_out(self, key: int, error: BadRow) -> None:
        if self._settings.on_error == "raise":
            raise DataError(f"{self._rows.where(key)}: {error}") from error
        self.skipped[error.reason] += 1
        logger.debug("skipped %s: %s", self._rows.where(key), error)


def open_source(settings: SourceSettings) -> Source:
    """Open and check a data set.

    Raises DataError if it is not there or holds no usable row, and, unless `on_error` is "skip", at the first row that
    cannot be used: the message has the file, the line and the field.
    """
    if settings.fields.videos and not settings.fields.video_fps:
        check_decoder()
    path = Path(settings.path).expanduser()
    kind = settings.format
    if kind == "auto":
        kind = _FILE_FORMATS.get(path.suffix.lower(), "datasets")  # type: ignore[assignment]
    if "://" in settings.path:
        raise DataError(
            f"{settings.path}: data sets are not downloaded from URLs; give a file, or a hub data set's name"
        )
    looks_local = kind != "datasets" or path.is_absolute() or path.suffix.lower() in BUILDERS
    if looks_local and not path.exists():
        raise DataError(f"{path}: no such file or folder{_similar(path)}")
    if kind == "jsonl":
        if not path.is_file():
            raise DataError(f"{path}: expected a JSONL file, found something else")
        if settings.name is not None or settings.split is not None:
            raise DataError(f"{path}: a JSONL file has neither `name` nor `split`; leave them out")
        return Source(JsonlRows(path), settings)
    return Source(open_table(path, settings), settings)


def _similar(path: Path) -> str:
    """A hint at a file of a similar name."""
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    near = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
