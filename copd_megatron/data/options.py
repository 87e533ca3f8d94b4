"""Options of a multiple choice, in the forms in which data sets give them."""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Mapping
from typing import Any, Literal

from copd_megatron.data.row import BadRow

AnswerBy = Literal["label", "text"]

_LONGEST = 20_000
"""Characters of a list given as a text; Python's parser is not safe with texts of any length."""


def read_options(value: Any, name: str) -> dict[str, str]:
    """Label to text; empty where the row has none. Raises BadRow.

    `value` is a mapping of labels (null and empty ones are left out), a list, or the text of a Python list.
    """
    if isinstance(value, str):
        value = _parsed(value, name) if value.strip() else None
    if not value:
        return {}
    if isinstance(value, Mapping):
        given = {str(label): text for label, text in value.items() if text not in (None, "")}
    elif isinstance(value, list) and len(value) <= len(string.ascii_uppercase):
        given = dict(zip(string.ascii_uppercase, value, strict=False))
    else:
        raise BadRow("options", f"field {name!r}: expected options, found {repr(value)[:80]}")
    for label, text in given.items():
        if isinstance(text, bool) or not isinstance(text, str | int | float):
            raise BadRow("options", f"field {name!r}: option {label} must be a text, found {repr(text)[:80]}")
    return {label: str(text) for label, text in given.items()}


def labelled(options: Mapping[str, str]) -> str:
    """A line per option; data sets that have written the labels into the options keep theirs."""
    has_labels = all(re.match(rf"\(?{re.escape(label)}[).:]", text) for label, text in options.items())
    return "\n".join(text if has_labels else f"{label}. {text}" for label, text in options.items())


def gold_label(answer: str, options: Mapping[str, str], by: AnswerBy) -> str:
    """The label of the right option, which `answer` names by its label or by its text. Raises BadRow."""
    answer = answer.strip()
    named = [label for label, text in options.items() if answer == (label if by == "label" else text.strip())]
    if not named:
        raise BadRow("options", f"answer {answer[:80]!r} is the {by} of none of the options {repr(options)[:200]}")
    return named[0]


def _parsed(text: str, name: str) -> Any:
    """A list from its text: literals alone, nothing is run."""
    if len(text) > _LONGEST:
        raise BadRow("options", f"field {name!r}: a text of {len(text)} characters; the limit is {_LONGEST}")
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow("options", f"field {name!r}: {text[:80]!r} is not the text of a list") from error
