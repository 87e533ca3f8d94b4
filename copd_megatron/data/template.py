"""Texts with fields of a row in braces: `videos/{video ID}.mp4`."""

from __future__ import annotations

import re
from collections.abc import Callable

_SLOT = re.compile(r"\{([^{}]+)\}")


def slots(text: str) -> tuple[str, ...]:
    """Names of the fields in braces; `{}` stands for itself, so that `\\boxed{}` needs no escape."""
    return tuple(_SLOT.findall(text))


def fill(text: str, value_of: Callable[[str], str]) -> str:
    """`text` with values in place of its fields, whose own braces mean nothing; a line of which nothing is left is left
    out, such as that of the options where a row has none."""
    lines = []
    for line in text.split("\n"):
        filled = _SLOT.sub(lambda slot: value_of(slot[1]), line)
        if filled.strip() or not line.strip():
            lines.append(filled)
    return "\n".join(lines)
