"""JSONL sources: what is read, and how a wrong row is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from copd_megatron.data.settings import FieldMap, SourceSettings
from copd_megatron.data.sources import Source, open_source
from copd_megatron.errors import CopdError, DataError

GOOD = {"prompt": "1 + 1?", "answer": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


def write(folder: Path, *lines: dict[str, Any] | str | bytes, name: str = "train.jsonl") -> Path:
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path = folder / name
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return path


def open_lines(folder: Path, *lines: dict[str, Any] | str | bytes, **settings: Any) -> Source:
    return open_source(SourceSettings(path=str(write(folder, *lines)), **{"verifier": "exact", **settings}))


def test_rows_become_examples(tmp_path: Path) -> None:
    source = open_lines(tmp_path, GOOD, "", {"prompt": "café?", "answer": 3.5, "other": None}, "  ")
    assert len(source) == 2
    assert [example.answer for example in source] == ["2", "3.5"]
    second = source[-1]
    assert second.messages == [{"role": "user", "content": "café?"}]
    assert (second.uid, second.verifier, second.images, second.response) == ("train.jsonl:3", "exact", (), None)
    with pytest.raises(IndexError):
        source[2]


def test_fields_are_mapped_and_dotted_names_reach_into_fields(tmp_path: Path) -> None:
    row = {"q": "1?", "reward": {"gold": "one"}, "how": "choice", "demo": "It is one.", "id": 17, "a.b": "literal"}
    names = FieldMap(prompt="q", answer="reward.gold", verifier="how", response="demo", uid="id")
    example = open_lines(tmp_path, row, fields=names, verifier=None)[0]
    assert (example.answer, example.verifier, example.response, example.uid) == ("one", "choice", "It is one.", "17")
    assert open_lines(tmp_path, row, fields=FieldMap(prompt="q", answer="a.b"))[0].answer == "literal"


def test_conversations_are_read_and_a_last_assistant_message_is_the_demonstration(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}]},
        {"role": "assistant", "content": "2"},
    ]
    names = FieldMap(messages="turns", answer=None)
    example = open_lines(tmp_path, {"turns": turns}, fields=names, verifier=None, system_prompt="unused")[0]
    assert example.messages == [turns[0], {"role": "user", "content": "1+1?"}]
    assert (example.response, example.answer, example.verifier) == ("2", "", "")


def test_system_prompt_is_put_first(tmp_path: Path) -> None:
    example = open_lines(tmp_path, GOOD, system_prompt="Think.")[0]
    assert [message["role"] for message in example.messages] == ["system", "user"]
    assert example.messages[0]["content"] == "Think."


def test_limit_counts_usable_rows_and_reads_no_further(tmp_path: Path) -> None:
    source = open_lines(tmp_path, GOOD, "{", GOOD, "{", "{", on_error="skip", limit=2)
    assert len(source) == 2
    assert source.skipped == {"json": 1}


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        ('{"prompt": "1?", "answer": }', "json", "line 3: not valid JSON"),
        ("[1, 2]", "json", r"line 3: expected one JSON object per line, found b'\[1, 2\]"),
        (b'{"prompt": "\xff", "answer": "1"}', "json", "line 3: not valid JSON"),
        ("[" * 5000, "json", "line 3: not valid JSON"),
        ({"prompt": "1?", "anwser": "2"}, "field", "line 3: field 'answer' is missing; did you mean 'anwser'"),
        ({"text": "1?", "answer": "2"}, "field", r"found: 'text', 'answer' \(fields.prompt names the field\)"),
        ({"prompt": "1?", "answer": None}, "field", "line 3: field 'answer': expected a text, found null"),
        ({"prompt": "1?", "answer": True}, "field", "field 'answer': expected a text, found True"),
        ({"prompt": "1?", "answer": ["2"]}, "field", r"expected a text, found \['2'\]"),
        ({"prompt": " ", "answer": "2"}, "field", "line 3: field 'prompt' is empty"),
        ({"prompt": [{"role": "user"}], "answer": "2"}, "field", "fields.messages reads conversations"),
        ({"prompt": "see <image>", "answer": "2"}, "images", "1 places for images in the messages, but 0 images"),
        ({}, "field", "no field at all"),
    ],
)
def test_wrong_line_is_reported_with_its_place_or_skipped_and_counted(
    tmp_path: Path, line: dict[str, Any] | str | bytes, reason: str, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_lines(tmp_path, GOOD, "", line, GOOD)
    assert str(tmp_path / "train.jsonl") in str(caught.value)
    source = open_lines(tmp_path, GOOD, "", line, GOOD, on_error="skip")
    assert source.skipped == {reason: 1}
    assert [example.uid for example in source] == ["train.jsonl:1", "train.jsonl:4"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "expected a list of messages, found 'hello'"),
        ([], "expected a list of messages"),
        (["hello"], "message 1: expected role and content"),
        ([{"role": "user"}], "message 1: expected role and content"),
        ([{"role": "human", "content": "1"}], "role 'human', expected one of system, user"),
        ([{"role": "user", "content": 1}], "expected a text or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "part 1: expected a text, an image or a video"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}],
            "found 'url'; image parts mark the place",
        ),
        ([{"role": "assistant", "content": "2"}], "behind at least one other message"),
    ],
)
def test_wrong_conversation_is_reported(tmp_path: Path, messages: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_lines(tmp_path, {"turns": messages, "answer": "2"}, fields=FieldMap(messages="turns"))


def test_unknown_verifier_is_reported_where_it_stands(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: field 'how': unknown verifier 'exakt'; did you mean 'exact'"):
        open_lines(
            tmp_path, GOOD | {"how": "math"}, GOOD | {"how": "exakt"}, fields=FieldMap(verifier="how"), verifier=None
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier": "exakt"}, "did you mean 'exact'"),
        ({"verifier": None}, "answers need a verifier"),
        ({"verifier": "exact", "fields": {"verifier": "how"}}, "either `verifier` or `fields.verifier`"),
        ({"fields": {"prompt": "q", "messages": "m"}}, "either `prompt` or `messages`"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"pth": "x"}, "Extra inputs"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceSettings(**{"path": "x.jsonl", "verifier": "exact", **settings})


def test_every_setting_says_what_it_is_for() -> None:
    for model in (FieldMap, SourceSettings):
        for name, field in model.model_fields.items():
            assert field.description or name == "fields", name


@pytest.mark.parametrize(
    ("path", "settings", "message"),
    [
        ("trian.jsonl", {}, "no such file or folder; did you mean 'train.jsonl'"),
        ("gone/train.jsonl", {}, "gone does not exist either"),
        ("trian.parquet", {}, "no such file"),
        ("trian.csv", {}, "no such file"),
        (".", {"format": "jsonl"}, "expected a JSONL file"),
        ("train.jsonl", {"split": "train"}, "neither `name` nor `split`"),
    ],
)
def test_file_that_cannot_be_opened_is_reported(
    tmp_path: Path, path: str, settings: dict[str, Any], message: str
) -> None:
    write(tmp_path, GOOD)
    with pytest.raises(DataError, match=message):
        open_source(SourceSettings(path=str(tmp_path / path), verifier="exact", **settings))


@pytest.mark.parametrize("path", ["https://example.org/train.jsonl", "s3://bucket/train.parquet"])
def test_urls_are_refused(path: str) -> None:
    with pytest.raises(DataError, match="not downloaded from URLs"):
        open_source(SourceSettings(path=path, verifier="exact"))


@pytest.mark.parametrize("lines", [[""], ["{", "[]"]])
def test_data_set_without_a_usable_row_is_refused(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(DataError, match="no usable row"):
        open_lines(tmp_path, *lines, on_error="skip")


def test_file_that_changes_while_it_is_in_use_is_noticed(tmp_path: Path) -> None:
    source = open_lines(tmp_path, GOOD, GOOD)
    write(tmp_path, {"prompt": "other", "answer": "9"}, GOOD)
    with pytest.raises(DataError, match="was changed while it was in use"):
        source[0]


def test_byte_order_mark_and_windows_line_ends_are_understood(tmp_path: Path) -> None:
    source = open_lines(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", json.dumps(GOOD) + "\r")
    assert [example.answer for example in source] == ["2", "2"]


def test_overlong_line_is_refused_without_being_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("copd_megatron.data.rows._LONGEST_LINE", 100)
    assert len(open_lines(tmp_path, GOOD)) == 1
    with pytest.raises(DataError, match="line 2: longer than 100 bytes"):
        open_lines(tmp_path, GOOD, "x" * 1000)


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, GOOD)
    assert len(open_source(SourceSettings(path="~/train.jsonl", verifier="exact"))) == 1


@given(st.lists(st.tuples(st.text(min_size=1, max_size=20), st.integers(0, 2)), min_size=1, max_size=8))
def test_any_text_comes_back_from_any_line(folder: Path, rows: list[tuple[str, int]]) -> None:
    usable = [(prompt, empty) for prompt, empty in rows if prompt.strip()]
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for prompt, empty in usable:
            file.write(json.dumps({"prompt": prompt, "answer": "1"}, ensure_ascii=False) + "\n" + "\n" * empty)
    if usable:
        source = open_source(SourceSettings(path=str(path), verifier="exact", image_placeholder=""))
        assert [source[-1 - n].messages[0]["content"] for n in range(len(source))] == [text for text, _ in usable[::-1]]


@given(st.binary(max_size=200))
def test_no_file_content_is_anything_but_examples_or_an_error_to_act_on(folder: Path, content: bytes) -> None:
    path = folder / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(CopdError):
        open_source(SourceSettings(path=str(path), verifier="exact"))
