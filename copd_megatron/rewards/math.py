"""The verifier of mathematics: are two expressions equal? Reading and comparing is math-verify's work."""

from __future__ import annotations

import logging

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from copd_megatron.rewards.final import final_part
from copd_megatron.rewards.verdict import Unparsable

_READ = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

# It warns that its own timeout is off. It must be: its alarm would replace that of `judge`, and the pool has a limit.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def math(response: str, answer: str) -> float:
    """1.0 if the response's expression equals `answer`, else 0.0.

    The expression is, behind the last `</think>`: the last `\\boxed{}`, else what follows "final answer is" or "answer
    is", else the last LaTeX formula or number. `answer` is LaTeX, with or without `$…$` or `\\boxed{}`. Equality is
    math-verify's: fractions, decimals, sets, intervals, equations, matrices and percentages are compared by value.

    Takes unlimited time and memory on hostile input: run it in a `RewardPool`.
    Raises `Unparsable` if the response holds no expression, ValueError if `answer` is none.
    """
    marked = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    gold = _expressions(answer if marked else f"\\boxed{{{answer}}}")
    if not gold:
        raise ValueError(f"gold answer {answer[:80]!r}: expected a LaTeX expression")
    given = _expressions(final_part(response))
    if not given:
        raise Unparsable(f"found {response[-80:]!r}, expected a \\boxed{{}} expression")
    return float(verify(gold, given, timeout_seconds=None))


def _expressions(text: str) -> list[object]:
    """The expression that math-verify finds, parsed and as a string; empty if it finds none."""
    found: list[object] = parse(text, extraction_config=_READ, parsing_timeout=None)
    return found


# The first expression costs half a second of building tables, which should not come out of a response's time limit.
math(r"\boxed{x^2 + 2x + 1}", "(x + 1)^2")
