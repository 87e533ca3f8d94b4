"""The verifier `digits`: what counts as an answer, and when two answers are the same."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.data.mini.questions import Question, gold_answer
from copd_megatron.data.mini.task import OPERATIONS
from copd_megatron.rewards.digits import digits
from copd_megatron.rewards.verdict import Unparsable


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        ("3852>18", "18", 1.0),
        ("3852>19", "18", 0.0),
        ("3852>1", "18", 0.0),
        ("3852>180", "18", 0.0),
        ("3852>81", "18", 0.0),
        (">18", "18", 1.0),
        ("9999>18", "18", 1.0),
        ("18>3852", "18", 0.0),
        ("3852>018", "18", 1.0),
        ("3852>00", "0", 1.0),
        ("3852>0", "0", 1.0),
        ("3852> 18\n", "18", 1.0),
        ("0258>0258", "0 2 5 8", 1.0),
        ("0258>258", "0 2 5 8", 0.0),
        ("0258>00258", "0 2 5 8", 0.0),
        ("0258>8520", "0 2 5 8", 0.0),
        ("0000>0", "0 0 0 0", 0.0),
        ("25>25", "2 5", 1.0),
        ("25>025", "2 5", 0.0),
        ("1>" + "9" * 100_000, "18", 0.0),
        ("1>" + "0" * 100_000 + "18", "18", 1.0),
    ],
)
def test_the_answer_behind_the_arrow_is_compared_by_value_or_digit_by_digit(
    response: str, answer: str, reward: float
) -> None:
    assert digits(response, answer) == reward


@pytest.mark.parametrize(
    "response",
    [
        *("", "18", "3852=18", "3852>", "3852> ", ">3852>18", "3852>18>", "3852>18<|im_end|>", "3852>18.", "3852>-18"),
        *("3852>1 8", "3852>18 or 19", "3852>18,", "3852>eighteen", "3852>²", "3852>१८", ">" * 100_000),
    ],
)
def test_a_response_without_one_readable_answer_is_unparsable(response: str) -> None:
    with pytest.raises(Unparsable, match="expected one '>' followed by digits only"):
        digits(response, "18")


@pytest.mark.parametrize("answer", ["", "x", "-1", "1.5", "2 5 ", "2  5", "12 5", "2,5"])
def test_a_gold_answer_of_another_form_is_an_error_of_the_data(answer: str) -> None:
    with pytest.raises(ValueError, match="gold answer") as caught:
        digits("25>25", answer)
    assert not isinstance(caught.value, Unparsable)


@given(st.sampled_from(OPERATIONS), st.lists(st.integers(0, 9), min_size=2, max_size=8), st.booleans())
def test_exactly_the_right_solution_is_rewarded(operation: str, numbers: list[int], ordinary: bool) -> None:
    question = Question(operation, tuple(numbers))  # type: ignore[arg-type]
    gold = question.solve(ordinary)
    wrong = question.solve(not ordinary)
    assert digits(question.respond(gold), gold_answer(gold)) == 1.0
    assert digits(question.respond(wrong), gold_answer(gold)) == float(wrong == gold)


def test_the_verifier_starts_without_torch() -> None:
    code = "import sys, copd_megatron.rewards.digits; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
