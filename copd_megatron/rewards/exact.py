"""The verifier of short texts: is the response the answer, up to how it is written?"""

from __future__ import annotations

import unicodedata

from copd_megatron.rewards.final import final_part, plain, stated_answer
from copd_megatron.rewards.verdict import Unparsable

_QUOTES = "\"'“”‘’«»"


def exact(response: str, answer: str) -> float:
    """1.0 if the normalised response equals the normalised `answer`, else 0.0.

    The response is, behind the last `</think>`: the last `\\boxed{}`, else the line behind the last "answer is" or
    "answer:", else all of it. Normalised means: Unicode NFKC, case folded, white space runs to one space, without
    surrounding quotes and Markdown marks and without a last full stop. Articles and other words are not removed.

    Raises `Unparsable` if nothing is left of the response, ValueError if nothing is left of `answer`.
    """
    gold = normalise(answer)
    if not gold:
        raise ValueError(f"gold answer {answer[:80]!r}: nothing is left of it after normalisation")
    text = final_part(response)
    stated = stated_answer(text)
    given = normalise(text if stated is None else stated)
    if not given:
        raise Unparsable("the response is empty")
    return float(given == gold)


def normalise(text: str) -> str:
    """The form in which texts are compared."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain(plain(folded).strip(_QUOTES)).split())
