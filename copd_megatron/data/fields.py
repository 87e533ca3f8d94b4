"""From a row of a data set to its checked parts. Pure: no file is opened and no image decoded here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copd_megatron.data.media import Folders, Reference, checked_reference
from copd_megatron.data.row import BadRow
from copd_megatron.data.settings import SourceSettings
from copd_megatron.errors import ConfigError
from copd_megatron.rewards import known

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """An `Example` whose images are not loaded yet."""

    uid: str
    messages: list[dict[str, Any]]
    images: tuple[Reference, ...]
    answer: str
    verifier: str
    response: str | None


def read_record(row: Mapping[str, Any], settings: SourceSettings, folders: Folders, uid: str) -> Record:
    """Check a row and arrange its parts; `uid` is used if the row brings none. Raises BadRow."""
    fields = settings.fields
    images = _images(_value(row, fields.images, "images"), folders) if fields.images else ()
    if fields.messages:
        messages = _conversation(_value(row, fields.messages, "messages"), fields.messages)
    else:
        name = fields.prompt or "prompt"
        messages = [{"role": "user", "content": _text(row, name, "prompt")}]
    response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or (response is not None and not isinstance(response, str)):
        raise BadRow("field", "the assistant's demonstration must be a text behind at least one other message")
    if fields.response:
        response = _text(row, fields.response, "response")
    if settings.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    return Record(
        uid=_text(row, fields.uid, "uid") if fields.uid else uid,
        messages=_with_images(messages, len(images), settings),
        images=images,
        answer=_text(row, fields.answer, "answer") if fields.answer else "",
        verifier=_verifier(row, settings),
        response=response,
    )


def _value(row: Mapping[str, Any], name: str, option: str) -> Any:
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise missing(name, [str(key) for key in row], option)
        found = found[part]
    return found


def missing(name: str, have: Sequence[str], option: str) -> BadRow:
    """The complaint that there is no field `name`, which the setting `fields.<option>` asks for."""
    near = difflib.get_close_matches(name, have, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    listed = ", ".join(map(repr, have[:30])) or "no field at all"
    return BadRow("field", f"field {name!r} is missing; {hint}found: {listed} (fields.{option} names the field)")


def _text(row: Mapping[str, Any], name: str, option: str) -> str:
    value = _value(row, name, option)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        hint = "; fields.messages reads conversations" if option == "prompt" and isinstance(value, list) else ""
        raise BadRow("field", f"field {name!r}: expected a text, found {_shown(value)}{hint}")
    if not value.strip():
        raise BadRow("field", f"field {name!r} is empty")
    return value


def _verifier(row: Mapping[str, Any], settings: SourceSettings) -> str:
    if not settings.fields.verifier:
        return settings.verifier or ""
    name = _text(row, settings.fields.verifier, "verifier")
    try:
        known(name)
    except ConfigError as error:
        raise BadRow("verifier", f"field {settings.fields.verifier!r}: {error}") from error
    return name


def _images(value: Any, folders: Folders) -> tuple[Reference, ...]:
    if value is None:
        return ()
    return tuple(checked_reference(one, folders) for one in (value if isinstance(value, list) else [value]))


def _conversation(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise BadRow("field", f"field {name!r}: expected a list of messages, found {_shown(value)}")
    messages = []
    for number, message in enumerate(value, 1):
        place = f"field {name!r}, message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise BadRow("field", f"{place}: expected role and content, found {_shown(message)}")
        if message["role"] not in _ROLES:
            raise BadRow("field", f"{place}: role {message['role']!r}, expected one of {', '.join(_ROLES)}")
        messages.append({"role": message["role"], "content": _content(message["content"], place)})
    return messages


def _content(content: Any, place: str) -> str | list[dict[str, str]]:
    """A text, or the checked parts if one of them is an image."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise BadRow("field", f"{place}: expected a text or a list of parts, found {_shown(content)}")
    parts = [_part(part, f"{place}, part {number}") for number, part in enumerate(content, 1)]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "".join(texts) if len(texts) == len(parts) else parts


def _part(part: Any, place: str) -> dict[str, str]:
    # Tables fill the fields that other parts have with nulls.
    filled = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    if filled.get("type") == "text" and isinstance(filled.get("text"), str):
        return {"type": "text", "text": filled["text"]}
    if filled == {"type": "image"}:
        return {"type": "image"}
    if filled.get("type") == "image":
        extra = ", ".join(repr(key) for key in filled if key != "type")
        raise BadRow("field", f"{place}: found {extra}; an image part marks the place, fields.images has the image")
    raise BadRow("field", f"{place}: expected a text or an image, found {_shown(part)}")


def _with_images(messages: list[dict[str, Any]], images: int, settings: SourceSettings) -> list[dict[str, Any]]:
    """The messages with one image part per image."""
    mark = settings.image_placeholder
    placed = [
        message if message["role"] == "assistant" else {**message, "content": _split(message["content"], mark)}
        for message in messages
    ]
    parts = [part for message in placed if isinstance(message["content"], list) for part in message["content"]]
    places = sum(part["type"] == "image" for part in parts)
    if places == 0 and images:
        first = next((message for message in placed if message["role"] == "user"), None)
        if first is None:
            raise BadRow("images", "no user's message that the images could belong to")
        text = [{"type": "text", "text": first["content"]}]
        first["content"] = [{"type": "image"}] * images + text
    elif places != images:
        hint = "" if settings.fields.images else "; fields.images is not set, so the row has none"
        literal = f"; image_placeholder='' takes {mark!r} literally" if mark else ""
        raise BadRow("images", f"{places} places for images in the messages, but {images} images{hint}{literal}")
    return placed


def _split(content: str | Sequence[dict[str, str]], mark: str) -> str | list[dict[str, str]]:
    """Content with an image part in place of every mark."""
    if isinstance(content, str):
        if not mark or mark not in content:
            return content
        content = [{"type": "text", "text": content}]
    parts: list[dict[str, str]] = []
    for part in content:
        if part["type"] == "image" or not mark:
            parts.append(part)
            continue
        for number, text in enumerate(part["text"].split(mark)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
    return parts


def _shown(value: Any) -> str:
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 80 else f"{type(value).__name__} {shown[:80]}…"
