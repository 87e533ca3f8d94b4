"""Options of a multiple choice, prompts put together from fields, and images that are named by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from pydantic import ValidationError

from copd_megatron.data.options import gold_label, labelled, read_options
from copd_megatron.data.row import BadRow
from copd_megatron.data.settings import SourceSettings
from copd_megatron.data.sources import Source, open_source
from copd_megatron.data.template import fill, slots
from copd_megatron.errors import DataError

COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255), "green": (0, 255, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in COLOURS.items():
        Image.new("RGB", (8, 6), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def open_rows(folder: Path, *rows: dict[str, Any], **settings: Any) -> Source:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(SourceSettings(path=str(path), **{"verifier": "choice_or_math", **settings}))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (["3 cm", 4], {"A": "3 cm", "B": "4"}),
        ("['3 cm', '$\\\\pi$']", {"A": "3 cm", "B": "$\\pi$"}),
        ({"A": "yes", "B": None, "C": "", "D": "no"}, {"A": "yes", "D": "no"}),
        ("[]", {}),
        (" ", {}),
        (None, {}),
        ([], {}),
        ({"A": None, "B": None}, {}),
    ],
)
def test_options_are_read_from_every_form(given: object, options: dict[str, str]) -> None:
    assert read_options(given, "options") == options


@pytest.mark.parametrize(
    "given",
    [
        "A. 3; B. 4",
        "__import__('os').getcwd()",
        "[" * 5000,
        "-" * 15000 + "1",
        f"['{'a' * 20_000}']",  # a list, but of a text that is longer than is read
        ["a"] * 27,
        ["a", None],
        [["a"]],
        [True],
        7,
    ],
    ids=str,
)
def test_what_is_no_list_of_options_is_refused(given: object) -> None:
    with pytest.raises(BadRow, match="field 'options'") as caught:
        read_options(given, "options")
    assert caught.value.reason == "options"


def test_options_get_labels_where_they_have_none() -> None:
    assert labelled({"A": "3", "B": "Ba."}) == "A. 3\nB. Ba."
    assert labelled({"A": "A. 3", "B": "(B) 4"}) == "A. 3\n(B) 4"


def test_gold_answer_is_found_by_label_or_by_text() -> None:
    options = {"A": "B", "B": "A", "C": "12 "}
    assert gold_label("A ", options, "label") == "A"
    assert gold_label("A", options, "text") == "B"
    assert gold_label("12", options, "text") == "C"
    with pytest.raises(BadRow, match="answer 'D' is the label of none of the options"):
        gold_label("D", options, "label")


def test_template_leaves_out_lines_of_which_nothing_is_left() -> None:
    values = {"question": "{options}?", "options": ""}
    text = "{question}\n{options}\n\nPut it into \\boxed{}."
    assert slots(text) == ("question", "options")
    assert fill(text, values.__getitem__) == "{options}?\n\nPut it into \\boxed{}."


def test_rows_with_and_without_options_share_a_prompt(folder: Path) -> None:
    source = open_rows(
        folder,
        {"question": "Which?", "options": "['x', 'y']", "answer": "B"},
        {"question": "How many?", "options": "[]", "answer": "12"},
        fields={"prompt": "Q: {question}\n{options}\nBox it.", "options": "options"},
    )
    assert [example.messages[0]["content"] for example in source] == [
        "Q: Which?\nA. x\nB. y\nBox it.",
        "Q: How many?\nBox it.",
    ]
    assert [example.answer for example in source] == ["B", "12"]


def test_gold_answer_given_as_a_text_becomes_a_label(folder: Path) -> None:
    row = {"prompt": "Which?", "choices": ["x", "y"], "answer": "y"}
    assert open_rows(folder, row, fields={"options": "choices"}, answer_by="text")[0].answer == "B"
    with pytest.raises(DataError, match="line 1: answer 'y' is the label of none of the options"):
        open_rows(folder, row, fields={"options": "choices"})


def test_row_without_options_is_none_for_the_verifier_of_choices(folder: Path) -> None:
    rows = {"prompt": "?", "options": ["x"], "answer": "A"}, {"prompt": "?", "options": None, "answer": "long text"}
    settings = {"fields": {"options": "options"}, "verifier": "choice"}
    with pytest.raises(DataError, match="line 2: field 'options' has no options; verifier choice_or_math takes such"):
        open_rows(folder, *rows, **settings)
    source = open_rows(folder, *rows, on_error="skip", **settings)
    assert (len(source), source.skipped) == (1, {"options": 1})


def test_answer_and_paths_are_put_together_too(folder: Path) -> None:
    source = open_rows(
        folder,
        {"prompt": "?", "my colour": "red", "answer": 12.5, "id": 3},
        fields={"images": "{my colour}.png", "answer": "{answer} ± 1", "uid": "problem {id}"},
    )
    assert source[0].images[0].getpixel((0, 0)) == COLOURS["red"]
    assert (source[0].answer, source[0].uid) == ("12.5 ± 1", "problem 3")
    with pytest.raises(DataError, match="leads out of the data file's folder"):
        open_rows(folder, {"prompt": "?", "name": "../x", "answer": 1}, fields={"images": "{name}.png"})


def test_field_of_a_template_that_is_no_text_is_refused(folder: Path) -> None:
    row = {"a": ["x"], "answer": "1"}
    with pytest.raises(DataError, match=r"field 'a': expected a text for fields\.prompt, found \['x'\]"):
        open_rows(folder, row, fields={"prompt": "{a}?"})
    with pytest.raises(DataError, match=r"field 'b' is missing; .*fields\.prompt names the field"):
        open_rows(folder, row, fields={"prompt": "{b}?"})


def named_by_number(folder: Path, question: str, **images: str | None) -> tuple[list[str], object]:
    row = {"prompt": question, "answer": "1", **{f"image_{n}": images.get(f"image_{n}") for n in (1, 2, 3)}}
    fields = {"images": ["image_1", "image_2", "image_3"]}
    example = open_rows(folder, row, fields=fields, image_placeholder="<image {}>")[0]
    shown = [next(name for name, c in COLOURS.items() if c == image.getpixel((0, 0))) for image in example.images]
    return shown, example.messages[0]["content"]


def test_images_of_several_fields_stand_where_their_numbers_do(folder: Path) -> None:
    images = {"image_1": "red.png", "image_3": "blue.png"}
    shown, content = named_by_number(folder, "Is <image 3> or <image 1> as <image 3>?", **images)
    assert shown == ["blue", "red", "blue"]
    assert content == [
        {"type": "text", "text": "Is "},
        {"type": "image"},
        {"type": "text", "text": " or "},
        {"type": "image"},
        {"type": "text", "text": " as "},
        {"type": "image"},
        {"type": "text", "text": "?"},
    ]


def test_images_that_no_text_names_come_first(folder: Path) -> None:
    images = {"image_1": "red.png", "image_2": "green.png"}
    shown, content = named_by_number(folder, "see <image 2>", **images)
    assert shown == ["red", "green"]
    assert content == [{"type": "image"}, {"type": "text", "text": "see "}, {"type": "image"}]
    assert named_by_number(folder, "see", **images)[0] == ["red", "green"]


def test_number_without_its_image_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="line 1: a text names image 2; the row has 1"):
        named_by_number(folder, "<image 2>", image_1="red.png")


def test_parquet_has_options_and_numbered_images_as_jsonl_has(folder: Path) -> None:
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question", "options", "answer")}
        | {f"image_{number}": datasets.Image() for number in (1, 2)}
    )
    rows = {
        "question": ["<image 2>?", "?"],
        "options": ["['<image 1>', 'y']", "[]"],
        "answer": ["B", "7"],
        "image_1": [Image.new("RGB", (8, 6), COLOURS["red"]), None],
        "image_2": [Image.new("RGB", (8, 6), COLOURS["blue"]), None],
    }
    for number in (0, 1):
        table = datasets.Dataset.from_dict(rows, features=features)
        table.to_parquet(folder / "parts" / f"{number}" / "validation-00000-of-00001.parquet")
    (folder / "parts" / "README.md").write_text("---\nconfigs:\n- config_name: other\n  data_files: x.parquet\n---\n")
    source = open_source(
        SourceSettings(
            path=str(folder / "parts"),
            format="parquet",
            split="validation",
            fields={"prompt": "{question}\n{options}", "options": "options", "images": ["image_1", "image_2"]},
            image_placeholder="<image {}>",
            verifier="choice_or_math",
        )
    )
    assert len(source) == 4
    assert [image.getpixel((0, 0)) for image in source[0].images] == [COLOURS["blue"], COLOURS["red"]]
    assert source[0].messages[0]["content"][1:3] == [{"type": "text", "text": "?\nA. "}, {"type": "image"}]
    assert source[1].messages[0]["content"] == "?"


def test_answer_by_text_needs_options() -> None:
    with pytest.raises(ValidationError, match=r"answer_by = text .*fields\.options"):
        SourceSettings(path="x", verifier="choice", answer_by="text")
