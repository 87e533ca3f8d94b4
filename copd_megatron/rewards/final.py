"""Where in a response the answer stands. Everything here takes time linear in the response."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\[{}]|\\boxed\s{0,4}\{|[{}]")
_STATEMENT = re.compile(r"\banswer\s{0,4}(?:\bis\b|\**[:=])", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s{0,4}\{([^{}]*)\}")
_MARKUP = " \t\r\n*_`$"


def final_part(response: str) -> str:
    """What stands behind the last `</think>`; the whole response where there is none."""
    return response.rpartition("</think>")[2]


def stated_answer(text: str) -> str | None:
    """The `plain` content of the last complete `\\boxed{…}`; else the `plain` rest of the line behind the last
    "answer is", "answer:" or "answer ="; None where there is neither."""
    box = last_boxed(text)
    if box is not None:
        return plain(box)
    end = max((match.end() for match in _STATEMENT.finditer(text)), default=None)
    return None if end is None else plain(text[end:].lstrip(_MARKUP + ":").partition("\n")[0])


def last_boxed(text: str) -> str | None:
    """The content of the `\\boxed{…}` that opens last among those that are closed, or None."""
    open_braces: list[int | None] = []  # where a box's content starts; None for other braces
    start, content = -1, None
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and opened > start:
                start, content = opened, text[opened : match.start()]
        elif token == "{":
            open_braces.append(None)
        elif token.startswith("\\boxed"):
            open_braces.append(match.end())
    return content


def plain(text: str) -> str:
    """`text` without LaTeX `\\text{}` wrappers, and at both ends without white space, Markdown emphasis, dollar signs
    and a last full stop."""
    return _WRAPPED.sub(r"\1", text).strip(_MARKUP).removesuffix(".").strip(_MARKUP)
