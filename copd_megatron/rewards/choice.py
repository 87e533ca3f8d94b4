"""The verifier of multiple choice: which letter does the response give?"""

from __future__ import annotations

import re

from copd_megatron.rewards.final import final_part, plain, stated_answer
from copd_megatron.rewards.verdict import Unparsable

_ALONE = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:]?")
_FIRST = re.compile(r"(?:(?i:option|choice)\s+)?[(\[]?([A-Z])(?![\w'’])")
_LABELLED = re.compile(r"\(?([A-Z])[).:]\**(?:\s|$)")


def choice(response: str, answer: str) -> float:
    """1.0 if the response gives the letter of `answer`, else 0.0.

    Looked at, behind the last `</think>`: the stated answer (the last `\\boxed{}`, else the line behind the last
    "answer is" or "answer:"), where the letter must come first: "B", "(B)", "option B", "B because …"; without one,
    the last line that is not empty, which must be a letter ("B", "(b).") or begin with a labelled one ("B. 12 cm",
    "(B) 12 cm"). A small letter counts only where it stands alone, so that "a" stays an article.

    Raises `Unparsable` if there is no letter at that place, ValueError if `answer` is not a letter.
    """
    gold = _ALONE.fullmatch(plain(answer))
    if gold is None:
        raise ValueError(f"gold answer {answer[:80]!r}: expected one letter such as 'B'")
    return float(_letter(final_part(response)) == gold[1].upper())


def _letter(text: str) -> str:
    stated = stated_answer(text)
    place = plain(plain(text).rpartition("\n")[2]) if stated is None else stated
    found = _ALONE.fullmatch(place) or (_LABELLED if stated is None else _FIRST).match(place)
    if found is None:
        raise Unparsable(f"found {place[:80]!r}, expected a letter")
    return found[1].upper()
