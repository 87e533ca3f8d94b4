"""`math`: which expression counts, and what is equal to what."""

from __future__ import annotations

import pytest

from copd_megatron.rewards.choice_or_math import choice_or_math
from copd_megatron.rewards.math import math
from copd_megatron.rewards.verdict import Unparsable


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5"),
        (r"\boxed{0.5}", r"\frac12"),
        (r"the answer is $\frac{2}{4}$.", r"$\frac{1}{2}$"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2"),
        (r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}"),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}"),
        (r"\boxed{50\%}", "0.5"),
        (r"\boxed{1{,}000}", "1000"),
        (r"so $7$, then \boxed{8}, not $9$", "8"),
        (r"<think>\boxed{1}</think>\boxed{2}", "2"),
        ("it must be 12", "12"),
    ],
)
def test_equal_expressions_are_rewarded(response: str, gold: str) -> None:
    assert math(response, gold) == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"\boxed{\frac{1}{3}}", "0.5"),
        (r"\boxed{1} \boxed{2}", "1"),
        (r"\boxed{1, 2}", "1"),
        (r"\boxed{0.33}", r"\frac13"),
        ("12 or rather 13", "12"),
    ],
)
def test_other_expressions_are_not(response: str, gold: str) -> None:
    assert math(response, gold) == 0.0


def test_response_without_an_expression_is_unparsable() -> None:
    with pytest.raises(Unparsable, match="boxed"):
        math("I do not know.", "1")


def test_gold_answer_that_is_no_expression_is_not_blamed_on_the_response() -> None:
    with pytest.raises(ValueError, match="gold answer") as caught:
        math(r"\boxed{1}", "$$")
    assert not isinstance(caught.value, Unparsable)


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"\boxed{B}", "B", 1.0),
        (r"\boxed{C}", "B", 0.0),
        ("The answer is B.", "B", 1.0),  # no box: an expression could not be read
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"\boxed{x}", "x", 1.0),
        (r"\boxed{3}", "4", 0.0),
    ],
)
def test_gold_answer_says_whether_a_letter_or_an_expression_is_wanted(
    response: str, answer: str, reward: float
) -> None:
    assert choice_or_math(response, answer) == reward
