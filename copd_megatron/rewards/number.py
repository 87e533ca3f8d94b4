"""The verifier of numbers: is the response's number the answer, within a tolerance?"""

from __future__ import annotations

import re
from fractions import Fraction

from copd_megatron.rewards.final import final_part, stated_answer
from copd_megatron.rewards.verdict import Unparsable

RELATIVE_TOLERANCE = Fraction(1, 10**6)
_LONGEST = 400  # digits; longer ones are noise, and exact arithmetic on them takes more than linear time
_NUMBER = re.compile(
    r"(?<![\w./])([-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3}\b)?)"
    r"(?:\s?/\s?([0-9]+)(?!\.?[0-9]))?"
)
_GOES_ON = re.compile(r"\s*(?:\^|/|,\s*[0-9]|[-+*×·±]\s*[0-9(\\])")
_CHARACTERS = str.maketrans({"−": "-", "–": "-", "\N{NO-BREAK SPACE}": " ", "\N{THIN SPACE}": " "})
_LATEX_MARK = re.compile(r"\\[,!;:%$ ]|\{,\}|\$|\^?\{?\\(?:circ|degree)\b\}?")
_LATEX_COMMAND = re.compile(r"\\[A-Za-z]+")


def number(response: str, answer: str) -> float:
    """1.0 if the response's number equals `answer`, else 0.0.

    The number is, behind the last `</think>`: the first one of the stated answer (the last `\\boxed{}`, else the line
    behind the last "answer is" or "answer:"), behind its last "=" if it has one; without a stated answer, the last
    number of the response. It may be written `-1,234.5`, `1.2e3` or `3/4`; units and percent signs are ignored.

    `answer` may give its tolerance: `12.5 ± 0.1` or `12.5 ± 5%` (`+-` also). Without one an integer must be met
    exactly and anything else within a relative 1e-6.

    Raises `Unparsable` if the response has no number, or has more there than a number: LaTeX commands, powers, sums,
    lists (`math` reads those). Raises ValueError if `answer` is not a number.
    """
    gold, tolerance = _gold(answer)
    return float(abs(_given(final_part(response).translate(_CHARACTERS)) - gold) <= tolerance)


def _gold(answer: str) -> tuple[Fraction, Fraction]:
    """Value and absolute tolerance."""
    value, sign, tolerance = answer.translate(_CHARACTERS).replace("+-", "±").partition("±")
    try:
        gold = _first(value)
        if not sign:
            return gold, Fraction(0) if gold.denominator == 1 else abs(gold) * RELATIVE_TOLERANCE
        allowed = _first(tolerance)
    except Unparsable as error:
        raise ValueError(f"gold answer {answer[:80]!r}: expected a number, or a number ± its tolerance") from error
    return gold, abs(gold) * allowed / 100 if "%" in tolerance else allowed


def _given(text: str) -> Fraction:
    stated = stated_answer(text)
    if stated is not None:
        return _first(stated)
    found = list(_NUMBER.finditer(text))
    if not found:
        raise Unparsable(f"found {text[-80:]!r}, expected a number")
    return _value(found[-1])


def _first(text: str) -> Fraction:
    """The first number behind the last "="."""
    searched = _LATEX_MARK.sub("", text).rpartition("=")[2]
    found = _NUMBER.search(searched)
    if found is None or _LATEX_COMMAND.search(searched):
        raise Unparsable(f"found {text[:80]!r}, expected a number")
    return _value(found)


def _value(found: re.Match[str]) -> Fraction:
    """The number that was found, if it is one and stands for itself."""
    number, denominator = found[1].replace(",", ""), int(found[2][:_LONGEST]) if found[2] else 1
    if len(found[0]) > _LONGEST or denominator == 0 or _GOES_ON.match(found.string, found.end()):
        raise Unparsable(f"found {found.string[found.start() : found.end() + 20][:80]!r}, expected one number")
    return Fraction(number) / denominator
