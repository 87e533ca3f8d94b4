"""From a row of a data set to its checked parts. Pure: no file is opened and nothing decoded here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copd_megatron.data.media import Folders, Reference, checked_reference
from copd_megatron.data.options import gold_label, labelled, read_options
from copd_megatron.data.places import with_media
from copd_megatron.data.row import BadRow
from copd_megatron.data.settings import SourceSettings
from copd_megatron.data.template import fill, slots
from copd_megatron.data.video import VideoReference, checked_videos
from copd_megatron.errors import ConfigError
from copd_megatron.rewards import known

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """An `Example` whose images and videos are not loaded yet."""

    uid: str
    messages: list[dict[str, Any]]
    images: tuple[Reference, ...]
    videos: tuple[VideoReference, ...]
    answer: str
    verifier: str
    response: str | None


def read_record(row: Mapping[str, Any], settings: SourceSettings, folders: Folders, uid: str) -> Record:
    """Check a row and arrange its parts; `uid` is used if the row brings none. Raises BadRow."""
    fields = settings.fields
    options = read_options(_value(row, fields.options, "options"), fields.options) if fields.options else {}
    images = _images(row, fields.images, folders) if fields.images else {}
    videos: tuple[VideoReference, ...] = ()
    if fields.videos:
        rate = _value(row, fields.video_fps, "video_fps") if fields.video_fps else None
        given = _value(row, fields.videos, "videos")
        if fields.video_fps and rate is None and given is not None:
            raise BadRow("field", f"field {fields.video_fps!r}: expected the videos' frames per second, found null")
        videos = checked_videos(given, rate, folders)
    if fields.messages:
        messages = _conversation(_value(row, fields.messages, "messages"), fields.messages)
    else:
        shown = {**row, fields.options: labelled(options)} if fields.options else row
        messages = [{"role": "user", "content": _text(shown, fields.prompt or "prompt", "prompt")}]
    response = messages.pop()["content"] if messages[-1]["role"] == "assistant" else None
    if not messages or (response is not None and not isinstance(response, str)):
        raise BadRow("field", "the assistant's demonstration must be a text behind at least one other message")
    if fields.response:
        response = _text(row, fields.response, "response")
    if settings.system_prompt is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": settings.system_prompt})
    messages, in_order = with_media(messages, images, len(videos), settings)
    return Record(
        uid=_text(row, fields.uid, "uid") if fields.uid else uid,
        messages=messages,
        images=in_order,
        videos=videos,
        answer=_answer(row, options, settings) if fields.answer else "",
        verifier=_verifier(row, settings),
        response=response,
    )


def _value(row: Mapping[str, Any], name: str, option: str) -> Any:
    if slots(name):
        return fill(name, lambda slot: _slot(row, slot, option))
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise missing(name, [str(key) for key in row], option)
        found = found[part]
    return found


def _slot(row: Mapping[str, Any], name: str, option: str) -> str:
    value = _value(row, name, option)
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise BadRow("field", f"field {name!r}: expected a text for fields.{option}, found {_shown(value)}")
    return "" if value is None else str(value)


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


def _answer(row: Mapping[str, Any], options: Mapping[str, str], settings: SourceSettings) -> str:
    fields = settings.fields
    assert fields.answer is not None
    if fields.options and not options and settings.verifier == "choice":
        raise BadRow("options", f"field {fields.options!r} has no options; verifier choice_or_math takes such rows too")
    answer = _text(row, fields.answer, "answer")
    return gold_label(answer, options, settings.answer_by) if options else answer


def _images(row: Mapping[str, Any], fields: str | Sequence[str], folders: Folders) -> dict[int, Reference]:
    """By number, which counts the images of one field, and several fields themselves."""
    if isinstance(fields, str):
        return dict(enumerate(_references(_value(row, fields, "images"), folders), 1))
    by_field = [_references(_value(row, name, "images"), folders) for name in fields]
    if crowded := [name for name, found in zip(fields, by_field, strict=True) if len(found) > 1]:
        raise BadRow("images", f"field {crowded[0]!r}: several images; of several fields each has one image or none")
    return {number: found[0] for number, found in enumerate(by_field, 1) if found}


def _references(value: Any, folders: Folders) -> list[Reference]:
    if value is None:
        return []
    return [checked_reference(one, folders) for one in (value if isinstance(value, list) else [value])]


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
    """A text, or the checked parts if one of them is an image or a video."""
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
    kind = filled.get("type")
    if kind not in ("image", "video"):
        raise BadRow("field", f"{place}: expected a text, an image or a video, found {_shown(part)}")
    if len(filled) > 1:
        extra = ", ".join(repr(key) for key in filled if key != "type")
        raise BadRow(
            "field", f"{place}: found {extra}; {kind} parts mark the place, fields.{kind}s has what goes there"
        )
    return {"type": kind}


def _shown(value: Any) -> str:
    shown = "null" if value is None else repr(value)
    return shown if len(shown) <= 80 else f"{type(value).__name__} {shown[:80]}…"
