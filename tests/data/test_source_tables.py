"""Parquet files and Hugging Face data sets give the same examples as JSONL."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from copd_megatron.data.media import Unread
from copd_megatron.data.settings import FieldMap, SourceSettings
from copd_megatron.data.sources import Source, open_source
from copd_megatron.errors import DataError

PICTURE = Image.new("RGB", (8, 6), (255, 0, 0))
ROWS = {
    "question": ["<image>?", "1 + 1?", "<image> or <image>?"],
    "answer": [1, 2, 3],
    "unused": ["x", "y", "z"],
}
PICTURES = [[PICTURE], [], [PICTURE, PICTURE]]
NAMES = FieldMap(prompt="question", images="pictures")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def table() -> datasets.Dataset:
    features = {
        "question": datasets.Value("string"),
        "answer": datasets.Value("int64"),
        "unused": datasets.Value("string"),
    }
    pictures = {"pictures": datasets.List(datasets.Image())}
    return datasets.Dataset.from_dict(ROWS | {"pictures": PICTURES}, features=datasets.Features(features | pictures))


def opened(path: Path, **settings: Any) -> Source:
    return open_source(SourceSettings(path=str(path), verifier="number", **{"fields": NAMES, **settings}))


def test_parquet_and_saved_data_sets_and_folders_give_the_same_examples(
    tmp_path: Path, table: datasets.Dataset
) -> None:
    table.to_parquet(tmp_path / "files" / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for path, settings in [
        ("files/train.parquet", {}),
        ("files/train.parquet", {"format": "parquet"}),
        ("files", {}),
        ("saved", {}),
        ("splits", {"split": "train"}),
    ]:
        source = opened(tmp_path / path, **settings)
        assert [example.answer for example in source] == ["1", "2", "3"]
        assert [[image.getpixel((0, 0)) for image in example.images] for example in source] == [
            [(255, 0, 0)] * len(pictures) for pictures in PICTURES
        ]
        assert [part["type"] for part in source[2].messages[0]["content"]] == ["image", "text", "image", "text"]
        assert source[1].messages == [{"role": "user", "content": "1 + 1?"}]


def test_images_are_counted_but_not_read_when_a_source_is_opened(tmp_path: Path, table: datasets.Dataset) -> None:
    table.save_to_disk(tmp_path / "saved")
    rows = opened(tmp_path / "saved")._rows
    assert [row["pictures"] for _, row in rows.scan() if isinstance(row, dict)] == [
        [Unread()],
        [],
        [Unread(), Unread()],
    ]
    assert all("unused" not in row for _, row in rows.scan() if isinstance(row, dict))
    renamed = table.map(lambda row: {"question": "<image>?"})
    renamed.save_to_disk(tmp_path / "wrong")
    with pytest.raises(DataError, match=r"wrong, row 1 \(counted from 0\): 1 places for images .* but 0 images"):
        opened(tmp_path / "wrong")
    assert opened(tmp_path / "wrong", on_error="skip").skipped == {"images": 2}


def test_undecodable_image_in_a_table_is_reported_or_skipped(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    content = [buffer.getvalue(), b"broken", None]
    table = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"], "answer": ["1"] * 3, "image": content})
    table.to_parquet(tmp_path / "raw.parquet")
    names = FieldMap(images="image")
    source = opened(tmp_path / "raw.parquet", fields=names)
    assert [len(source[index].images) for index in (0, 2)] == [1, 0]
    with pytest.raises(DataError, match=r"raw.parquet, row 1 \(counted from 0\): image in the row is none of"):
        source[1]
    source = opened(tmp_path / "raw.parquet", fields=names, on_error="skip")
    assert [example.uid for example in source] == ["raw.parquet:0", "raw.parquet:2", "raw.parquet:2"]
    assert source.skipped == {"image": 1}


def test_image_folder_is_read_and_paths_in_rows_cannot_leave_it(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    PICTURE.save(folder / "a.png")
    PICTURE.save(tmp_path / "outside.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "?", "answer": "1"}\n')
    names = FieldMap(images="image")
    assert opened(folder, fields=names)[0].images[0].size == (8, 6)
    paths = {"bytes": None, "path": str(tmp_path / "outside.png")}
    features = datasets.Features(
        {"prompt": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    hostile = datasets.Dataset.from_dict({"prompt": ["?"], "answer": ["1"], "image": [paths]}, features=features)
    hostile.to_parquet(tmp_path / "in" / "hostile.parquet")
    with pytest.raises(DataError, match=r"row 0 \(counted from 0\): image .*outside.png' is an absolute path"):
        _ = opened(tmp_path / "in" / "hostile.parquet", fields=names)[0]


def test_conversations_in_tables_are_read_though_their_parts_are_padded_with_nulls(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "?"}]}]
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG")
    table = datasets.Dataset.from_dict({"messages": [turns], "answer": ["1"], "pictures": [[buffer.getvalue()]]})
    table.to_parquet(tmp_path / "chat.parquet")
    example = opened(tmp_path / "chat.parquet", fields=FieldMap(messages="messages", images="pictures"))[0]
    assert example.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
    assert len(example.images) == 1


def test_csv_and_json_files_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,answer\n1?,2\n")
    (tmp_path / "a.json").write_text('[{"prompt": "1?", "answer": {"gold": 2}}]')
    assert opened(tmp_path / "a.csv", fields=FieldMap())[0].answer == "2"
    assert opened(tmp_path / "a.json", fields=FieldMap(answer="answer.gold"))[0].answer == "2"


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("saved", {"fields": FieldMap(prompt="qestion")}, "field 'qestion' is missing; did you mean 'question'"),
        ("saved", {"fields": FieldMap(prompt="question", images="image")}, r"'image' is missing.*\(fields.images"),
        ("saved", {"split": "train"}, "there is no split 'train'; it has no splits"),
        ("splits", {}, "has the splits train, test; say which one with `split`"),
        ("splits", {"split": "tset"}, "there is no split 'tset'; it has train, test"),
        ("files/train.parquet", {"split": "test"}, "Unknown split"),
        ("broken.parquet", {}, "cannot be opened as a data set: ArrowInvalid"),
        ("broken.xyz", {}, "cannot tell the format of a .xyz file"),
        ("empty", {}, "cannot be opened as a data set"),
    ],
)
def test_data_set_that_cannot_be_opened_is_reported(
    tmp_path: Path, table: datasets.Dataset, path: str, settings: dict[str, Any], message: str
) -> None:
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    table.to_parquet(tmp_path / "files" / "train.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "broken.xyz").write_bytes(b"?")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        opened(tmp_path / path, **settings)


def test_hub_data_set_that_cannot_be_reached_is_reported() -> None:
    with pytest.raises(DataError, match="no/such: cannot be opened as a data set"):
        open_source(SourceSettings(path="no/such", split="train", verifier="exact"))
