"""The verifier of the mini suite: is what stands behind `>` the answer?"""

from __future__ import annotations

import re

from copd_megatron.rewards.verdict import Unparsable

_RESPONSE = re.compile(r"[^>]*>\s*([0-9]+)\s*")
_NUMBER = re.compile(r"[0-9]+")
_SEQUENCE = re.compile(r"[0-9]( [0-9])+")


def digits(response: str, answer: str) -> float:
    """1.0 if `response` gives `answer`, else 0.0.

    A response is anything without `>`, one `>`, and digits to the end. What stands before `>` is not judged, and
    special tokens must have been removed. The form of `answer` says how to compare: `18` is a number, compared by
    value (`018` is right, `180` and `1` are wrong); `0 2 5 8` is a sequence, of which every digit counts (`0258` is
    right, `258` is wrong).

    Raises `Unparsable` if no answer can be read from the response, `ValueError` if `answer` has neither form.
    """
    given = _RESPONSE.fullmatch(response)
    if given is None:
        raise Unparsable(f"found {response[:80]!r}, expected one '>' followed by digits only")
    if _SEQUENCE.fullmatch(answer):
        return float(given[1] == answer.replace(" ", ""))
    if _NUMBER.fullmatch(answer):
        return float(_value(given[1]) == _value(answer))
    raise ValueError(f"gold answer {answer!r}: expected a number such as '18' or a sequence such as '0 2 5 8'")


def _value(number: str) -> str:
    """Leading zeros carry no value; as text, so that a number of any length is compared in linear time."""
    return number.lstrip("0") or "0"
