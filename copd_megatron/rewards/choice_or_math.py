"""The verifier of data sets that mix multiple choice with other problems: the gold answer says which it is."""

from __future__ import annotations

import re

from copd_megatron.rewards.choice import choice
from copd_megatron.rewards.math import math

_LETTER = re.compile(r"\s*[A-Z]\s*")


def choice_or_math(response: str, answer: str) -> float:
    """As `choice` if `answer` is one capital letter, else as `math`."""
    return choice(response, answer) if _LETTER.fullmatch(answer) else math(response, answer)
