"""Images of a source: where they stand in the conversation, which are refused, how they are decoded."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from copd_megatron.data.media import Folders, open_image
from copd_megatron.data.settings import FieldMap, SourceSettings
from copd_megatron.data.sources import Source, open_source
from copd_megatron.errors import DataError

IMAGE, RED, BLUE = {"type": "image"}, (255, 0, 0), (0, 0, 255)


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, colour in (("red", RED), ("blue", BLUE)):
        Image.new("RGB", (8, 6), colour).save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def open_rows(folder: Path, *rows: dict[str, Any], messages: bool = False, **settings: Any) -> Source:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps({"answer": "1"} | row) + "\n" for row in rows))
    names = FieldMap(images="images", messages="messages" if messages else None)
    return open_source(SourceSettings(path=str(path), verifier="exact", fields=names, **settings))


def test_images_are_read_beside_the_data_file_in_order(folder: Path) -> None:
    example = open_rows(folder, {"prompt": "?", "images": ["images/red.png", "images/blue.png"]})[0]
    assert [image.getpixel((0, 0)) for image in example.images] == [RED, BLUE]
    assert [(image.mode, image.size) for image in example.images] == [("RGB", (8, 6))] * 2
    assert example.messages == [{"role": "user", "content": [IMAGE, IMAGE, text("?")]}]


@pytest.mark.parametrize("images", [None, []])
def test_row_may_have_no_image(folder: Path, images: object) -> None:
    example = open_rows(folder, {"prompt": "?", "images": images})[0]
    assert (example.images, example.messages[0]["content"]) == ((), "?")


def test_missing_images_field_is_an_error_and_not_a_row_without_images(folder: Path) -> None:
    with pytest.raises(DataError, match="line 1: field 'images' is missing; did you mean 'image'"):
        open_rows(folder, {"prompt": "?", "image": "images/red.png"})


@pytest.mark.parametrize(
    ("prompt", "content"),
    [
        ("<image>\nwhat?", [IMAGE, text("\nwhat?")]),
        ("a <image> b", [text("a "), IMAGE, text(" b")]),
        ("a <image>", [text("a "), IMAGE]),
    ],
)
def test_placeholder_becomes_the_place_of_the_image(folder: Path, prompt: str, content: object) -> None:
    assert open_rows(folder, {"prompt": prompt, "images": "images/red.png"})[0].messages[0]["content"] == content


def test_placeholders_can_be_turned_off_and_renamed(folder: Path) -> None:
    row = {"prompt": "<image> [I]", "images": ["images/red.png"]}
    off, renamed = (open_rows(folder, row, image_placeholder=mark)[0] for mark in ("", "[I]"))
    assert off.messages[0]["content"] == [IMAGE, text("<image> [I]")]
    assert renamed.messages[0]["content"] == [text("<image> "), IMAGE]


def test_places_are_filled_in_order_across_messages(folder: Path) -> None:
    turns = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "<image>?"},
        {"role": "assistant", "content": "An <image> it is."},
        {"role": "user", "content": [text("and"), IMAGE]},
    ]
    source = open_rows(folder, {"messages": turns, "images": ["images/red.png", "images/blue.png"]}, messages=True)
    contents = [message["content"] for message in source[0].messages]
    assert contents == ["Look.", [IMAGE, text("?")], "An <image> it is.", [text("and"), IMAGE]]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("<image>", ["images/red.png"] * 2, "1 places for images in the messages, but 2 images"),
        ("<image><image>", "images/red.png", "2 places for images in the messages, but 1 images"),
        ("<image>", None, "1 places for images in the messages, but 0 images"),
    ],
)
def test_places_and_images_must_agree(folder: Path, prompt: str, images: object, message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {message}"):
        open_rows(folder, {"prompt": prompt, "images": images})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/etc/hostname", "absolute path"),
        ("../secret.png", "leads out of"),
        ("images/../../secret.png", "leads out of"),
        ("https://example.org/a.png", "is a URL"),
        ("file:///etc/hostname", "is a URL"),
        ("data:image/png;base64,AAAA", "is a URL"),
        ("", "must be a path or bytes"),
        (7, "must be a path or bytes"),
        ({"path": "/etc/hostname"}, "absolute path"),
    ],
)
def test_paths_that_lead_elsewhere_are_refused_at_once(folder: Path, path: object, message: str) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "?", "images": [one]} for one in ("images/red.png", path)]
    with pytest.raises(DataError, match=f"train.jsonl, line 2: .*image.*{message}"):
        open_rows(folder, *rows)
    source = open_rows(folder, *rows, on_error="skip")
    assert (len(source), source.skipped) == (1, {"path": 1})


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (None, "path", r"image 'images/bad.png': no such file in"),
        (b"not an image", "image", "image 'images/bad.png' is none of PNG, JPEG"),
        (encoded(Image.effect_noise((64, 64), 50))[:700], "image", "image 'images/bad.png' cannot be decoded"),
        (encoded(Image.new("RGB", (101, 100))), "image", "has 101 x 100 pixels; the limit max_pixels is 10000"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "image", "is none of"),
    ],
    ids=["missing", "text", "truncated", "too large", "postscript"],
)
def test_bad_image_is_reported_with_its_line_or_replaced_by_the_next_row(
    folder: Path, content: bytes | None, reason: str, message: str
) -> None:
    if content is not None:
        (folder / "images" / "bad.png").write_bytes(content)
    rows = [{"prompt": str(n), "images": f"images/{name}.png"} for n, name in enumerate(["red", "bad", "blue", "bad"])]
    source = open_rows(folder, *rows, max_pixels=10_000)
    with pytest.raises(DataError, match=f"train.jsonl, line 2: .*{message}"):
        source[1]
    source = open_rows(folder, *rows, max_pixels=10_000, on_error="skip")
    for _ in range(2):
        assert [example.uid.rpartition(":")[2] for example in source] == ["1", "3", "3", "1"]
        assert source.skipped == {reason: 2}


def test_source_without_any_usable_image_ends_in_an_error(folder: Path) -> None:
    source = open_rows(
        folder, {"prompt": "?", "images": "none.png"}, {"prompt": "?", "images": "none.png"}, on_error="skip"
    )
    with pytest.raises(DataError, match="no usable row is left"):
        source[0]


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it has `side` x `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 30_000])
def test_decompression_bomb_is_refused_before_it_is_decoded(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(DataError, match="max_pixels"):
        open_image(bomb(side), Folders(None), max_pixels=50_000_000)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_every_listed_format_is_decoded(kind: str) -> None:
    image = open_image(encoded(Image.new("RGB", (16, 16), RED), kind), Folders(None), 1000)
    assert image.mode == "RGB"
    assert np.abs(np.array(image.getpixel((8, 8))) - RED).max() < 5


def test_transparency_is_put_on_white_and_orientation_is_applied() -> None:
    clear = open_image(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))), Folders(None), 1000)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = open_image(encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif), Folders(None), 1000)
    assert turned.size == (4, 8)


def test_sixteen_bit_grey_keeps_its_brightness() -> None:
    grey = Image.fromarray(np.full((4, 4), 0x8000, np.uint16))
    assert open_image(encoded(grey), Folders(None), 1000).getpixel((0, 0)) == (128, 128, 128)
