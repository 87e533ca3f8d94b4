"""Rows of Parquet files and Hugging Face data sets, memory-mapped by `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.data.fields import missing
from copd_megatron.data.media import Folders, Unread
from copd_megatron.data.row import BadRow
from copd_megatron.data.settings import SourceSettings
from copd_megatron.errors import DataError

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, DatasetDict

BUILDERS = {".json": "json", ".csv": "csv", ".arrow": "arrow", ".parquet": "parquet"}
"""Endings of single files and the reader of `datasets` for them."""


class TableRows:
    """Rows of a data set that is memory-mapped on disk; a row's key is its number, counted from 0."""

    def __init__(self, table: Dataset, name: str, folders: Folders, media: Sequence[str]) -> None:
        """`media` names the fields with images and videos."""
        self.folders = folders
        # Arrow's own values: images stay bytes and paths, which `media` opens with its limits.
        self._table = table.with_format("arrow")
        self._name = name
        self._media = media

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
        key = 0
        for batch in self._table.iter(batch_size=1000):
            unread = {
                name: _unread(batch.column(name))
                for name in self._media
                if name in batch.column_names and _holds_content(batch.column(name).type)
            }
            for number, row in enumerate(batch.drop_columns(list(unread)).to_pylist()):
                yield key, row | {name: counted[number] for name, counted in unread.items()}
                key += 1

    def read(self, key: int) -> dict[str, Any]:
        row: dict[str, Any] = self._table[key].to_pylist()[0]
        return row

    def where(self, key: int) -> str:
        return f"{self._name}, row {key} (counted from 0)"

    def uid(self, key: int) -> str:
        return f"{Path(self._name).name}:{key}"


def open_table(path: Path, settings: SourceSettings) -> TableRows:
    """Load the split that the settings mean. Raises DataError if that fails or a field is not there."""
    import datasets

    table = _load(path, settings)
    columns = _columns(settings, table.column_names)
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    cache = Path(datasets.config.HF_CACHE_HOME).absolute()
    folders = Folders(folder, (folder, cache)) if path.exists() else Folders(None, (cache,))
    media = [field for option in ("images", "videos") for field in settings.fields.columns().get(option, ())]
    name = f"{settings.path}[{settings.split}]" if settings.split else settings.path
    return TableRows(table.select_columns(columns), name, folders, media)


def _load(path: Path, settings: SourceSettings) -> Dataset:
    """The one split that the settings mean."""
    import datasets

    builder = BUILDERS.get(path.suffix.lower()) if settings.format != "parquet" else "parquet"
    try:
        if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            found = _from_disk(path, settings.split)
        elif path.is_file():
            if builder is None:
                raise DataError(f"{path}: cannot tell the format of a {path.suffix or 'nameless'} file; set `format`")
            found = datasets.load_dataset(builder, data_files=str(path), split=settings.split or "train")
        elif path.is_dir() and settings.format == "parquet":  # whatever a README beside the files may say
            found = datasets.load_dataset("parquet", data_dir=str(path), split=settings.split)
        else:
            found = datasets.load_dataset(settings.path, name=settings.name, split=settings.split)
    except DataError:
        raise
    except Exception as error:  # `datasets` raises whatever its readers raise
        first_line = str(error).partition("\n")[0]
        raise DataError(
            f"{settings.path}: cannot be opened as a data set: {type(error).__name__}: {first_line}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        return found
    if len(found) != 1:
        raise DataError(f"{settings.path}: has the splits {', '.join(found)}; say which one with `split`")
    return next(iter(found.values()))


def _from_disk(path: Path, split: str | None) -> Dataset | DatasetDict:
    import datasets

    found = datasets.load_from_disk(str(path))
    if split is None:
        return found
    splits = found if isinstance(found, datasets.DatasetDict) else {}
    if split not in splits:
        raise DataError(f"{path}: there is no split {split!r}; it has {', '.join(splits) or 'no splits'}")
    return splits[split]


def _columns(settings: SourceSettings, have: list[str]) -> list[str]:
    """The top-level fields that are read, and no others: unused ones may be large."""
    columns = []
    for option, names in settings.fields.columns().items():
        for name in names:
            column = name if name in have else name.partition(".")[0]
            if column not in have:
                raise DataError(f"{settings.path}: {missing(name, have, option)}")
            columns.append(column)
    return list(dict.fromkeys(columns))


def _holds_content(kind: pyarrow.DataType) -> bool:
    """Whether a column holds files themselves, and not only paths."""
    import pyarrow

    item = kind
    while hasattr(item, "value_type"):
        item = item.value_type
    kinds = (pyarrow.types.is_struct, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    return any(is_kind(item) for is_kind in kinds)


def _unread(column: pyarrow.ChunkedArray) -> list[list[Any]]:
    """Stand-ins for every row's images or videos, counted without touching their bytes; each is a list where the row
    has lists of frames."""
    import pyarrow.compute

    nested = hasattr(column.type, "value_type")
    one: Any = [Unread()] if nested and hasattr(column.type.value_type, "value_type") else Unread()
    if nested:
        counts = pyarrow.compute.list_value_length(column).to_pylist()
    else:
        counts = pyarrow.compute.is_valid(column).to_pylist()
    return [[one] * int(count or 0) for count in counts]
