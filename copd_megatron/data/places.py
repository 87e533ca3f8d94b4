"""Where in a conversation a row's images and videos stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from copd_megatron.data.media import Reference
from copd_megatron.data.row import BadRow
from copd_megatron.data.settings import SourceSettings


def with_media(
    messages: list[dict[str, Any]], images: Mapping[int, Reference], videos: int, settings: SourceSettings
) -> tuple[list[dict[str, Any]], tuple[Reference, ...]]:
    """The messages with one part per image and per video, and the images in the order of their parts."""
    marks = {"image": settings.image_placeholder, "video": settings.video_placeholder}
    placed = [
        message if message["role"] == "assistant" else {**message, "content": _split(message["content"], marks)}
        for message in messages
    ]
    parts = [part for message in placed if isinstance(message["content"], list) for part in message["content"]]
    numbers = [part.pop("number", None) for part in parts if part["type"] == "image"]
    in_order, unplaced = tuple(images.values()), []
    if "{}" in settings.image_placeholder:
        in_order, free = _by_number(images, numbers)
        unplaced = [{"type": "image"}] * free
    for kind, count in {"image": len(in_order) - len(unplaced), "video": videos}.items():
        places = sum(part["type"] == kind for part in parts)
        if places == 0 and count:
            unplaced += [{"type": kind}] * count
        elif places != count:
            named = settings.fields.images if kind == "image" else settings.fields.videos
            hint = "" if named else f"; fields.{kind}s is not set, so the row has none"
            literal = f"; {kind}_placeholder='' takes {marks[kind]!r} literally" if marks[kind] else ""
            raise BadRow(f"{kind}s", f"{places} places for {kind}s in the messages, but {count} {kind}s{hint}{literal}")
    if unplaced:
        first = next((message for message in placed if message["role"] == "user"), None)
        if first is None:
            kind = unplaced[0]["type"]
            raise BadRow(f"{kind}s", f"no user's message that the {kind}s could belong to")
        content = first["content"]
        first["content"] = unplaced + ([{"type": "text", "text": content}] if isinstance(content, str) else content)
    return placed, in_order


def _by_number(images: Mapping[int, Reference], numbers: Sequence[str | None]) -> tuple[tuple[Reference, ...], int]:
    """The images in the order in which texts name them, behind those that no text names, and how many these are."""
    named = [int(number) for number in numbers if number is not None]
    if len(named) != len(numbers):
        raise BadRow("images", "an image part without a number, where image_placeholder has one")
    if unknown := sorted(set(named) - set(images)):
        listed = ", ".join(map(str, images)) or "none"
        raise BadRow("images", f"a text names image {unknown[0]}; the row has {listed}")
    free = [image for number, image in images.items() if number not in named]
    return (*free, *(images[number] for number in named)), len(free)


def _split(content: str | Sequence[dict[str, str]], marks: Mapping[str, str]) -> str | list[dict[str, str]]:
    """Content with an image part in place of every mark of an image, and a video part in place of a video's; parts of
    numbered marks have their `number`."""
    kinds = {kind: re.escape(mark).replace(r"\{\}", r"(\d{1,4})") for kind, mark in marks.items() if mark}
    if not kinds:
        return content if isinstance(content, str) else list(content)
    pattern = re.compile("|".join(f"(?P<{kind}>{mark})" for kind, mark in kinds.items()))
    if isinstance(content, str):
        if not pattern.search(content):
            return content
        content = [{"type": "text", "text": content}]
    parts: list[dict[str, str]] = []
    for part in content:
        if part["type"] != "text":
            parts.append(part)
            continue
        end = 0
        for found in pattern.finditer(part["text"]):
            if found.start() > end:
                parts.append({"type": "text", "text": part["text"][end : found.start()]})
            number = next((group for group in found.groups() if group and group.isdecimal()), None)
            parts.append({"type": str(found.lastgroup)} | ({"number": number} if number else {}))
            end = found.end()
        if end < len(part["text"]):
            parts.append({"type": "text", "text": part["text"][end:]})
    return parts
