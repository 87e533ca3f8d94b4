"""`choice`, `exact` and `number`: what counts as the answer, and what does not."""

from __future__ import annotations

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.rewards import verifier
from copd_megatron.rewards.choice import choice
from copd_megatron.rewards.exact import exact
from copd_megatron.rewards.final import last_boxed
from copd_megatron.rewards.number import number
from copd_megatron.rewards.verdict import Unparsable


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(b).", "B"),
        ("**B**", "B"),
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{(C) 12 cm}}", "C"),
        (r"\boxed{A} no, \boxed{D}", "D"),
        ("The answer is (C) because A is wrong.", "C"),
        ("**Answer:** B", "B"),
        ("Answer: option D", "D"),
        ("answer: A\nlet me check\nThe final answer is B", "B"),
        ("It cannot be A.\nB. 12 cm", "B"),
        ("reasoning\n(C) 12 cm\n", "C"),
        ("<think>The answer is A</think>The answer is B.", "B"),
    ],
)
def test_choice_finds_the_stated_letter(response: str, letter: str) -> None:
    assert choice(response, letter) == 1.0
    assert choice(response, f"({letter.lower()})") == 1.0
    assert choice(response, "E") == 0.0


@pytest.mark.parametrize(
    "response",
    ["", "A dog", "I think so", "The answer is a dog", "The answer is Because", r"\boxed{12}", "AB", "B\nhm"],
)
def test_choice_does_not_take_words_for_letters(response: str) -> None:
    with pytest.raises(Unparsable):
        choice(response, "A")


def test_choice_refuses_a_gold_answer_that_is_no_letter() -> None:
    with pytest.raises(ValueError, match=r"gold answer 'Paris': expected one letter") as caught:
        choice("A", "Paris")
    assert not isinstance(caught.value, Unparsable)


@pytest.mark.parametrize(
    "response",
    [
        "Paris",
        " paris.\n",
        "**Paris**",
        '"Paris"',
        "The answer is Paris.",
        r"\boxed{\text{Paris}}",
        "no</think>\nＰaris",
    ],
)
def test_exact_ignores_how_the_answer_is_written(response: str) -> None:
    assert exact(response, "Paris") == 1.0


@pytest.mark.parametrize("response", ["The capital is Paris", "Pari", "Paris London", "Answer: Paris\nAnswer: London"])
def test_exact_is_not_content_with_containing_the_answer(response: str) -> None:
    assert exact(response, "Paris") == 0.0


def test_exact_cannot_parse_an_empty_response() -> None:
    with pytest.raises(Unparsable):
        exact(" \n", "Paris")
    with pytest.raises(ValueError, match="gold answer"):
        exact("Paris", " . ")


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("42", "42"),
        ("we had 7, now it is 42.", "42"),
        ("The answer is 42 of 99 apples", "42"),
        ("The answer is 3 + 4 = 7", "7"),
        (r"\boxed{1{,}234.50}", "1234.5"),
        (r"\boxed{-3\,\text{cm}}", "-3"),
        (r"\boxed{90^\circ}", "90"),
        ("about −5 degrees", "-5"),
        ("between 3-4", "4"),
        ("1,234,567", "1234567"),
        ("$1.2e3$", "1200"),
        ("it is 3/4.", "0.75"),
        (".5", "0.5"),
        ("37%", "37"),
        ("0.3333333", "1/3"),
        ("12.58", "12.5 ± 0.1"),
        ("98", "100 +- 5%"),
        ("<think>5</think>6", "6"),
    ],
)
def test_number_reads_the_usual_notations(response: str, gold: str) -> None:
    assert number(response, gold) == 1.0


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        ("12345678", "12345679"),
        ("42.0001", "42"),
        ("0.333", "1/3"),
        ("12.61", "12.5 ± 0.1"),
        ("94", "100 ± 5%"),
        ("-5", "5"),
        ("5 then 6", "5"),
    ],
)
def test_number_holds_to_the_tolerance(response: str, gold: str) -> None:
    assert number(response, gold) == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "none",
        "",
        r"\boxed{\frac{1}{2}}",
        r"\boxed{2^{10}}",
        r"\boxed{1, 2, 3}",
        "answer: 3 + 4",
        "1/0",
        "2024/05/06",
        "7" * 500,
        "x5",
    ],
)
def test_number_refuses_what_is_more_or_less_than_a_number(response: str) -> None:
    with pytest.raises(Unparsable):
        number(response, "1")


@pytest.mark.parametrize("gold", ["", "Paris", "5 ± much", r"\frac{1}{2}"])
def test_number_refuses_a_gold_answer_that_is_none(gold: str) -> None:
    with pytest.raises(ValueError, match="gold answer") as caught:
        number("5", gold)
    assert not isinstance(caught.value, Unparsable)


@given(st.integers(-(10**30), 10**30), st.integers(-(10**30), 10**30))
def test_number_compares_integers_exactly(given_value: int, gold: int) -> None:
    assert number(f"It is {given_value:,}.", str(gold)) == float(given_value == gold)
    assert number(f"\\boxed{{{gold}}}", str(gold)) == 1.0


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{5} } \boxed{6", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ \boxed{5}", "5"),
        (r"\boxed{5", None),
        ("", None),
    ],
)
def test_last_complete_box_is_found(text: str, content: str | None) -> None:
    assert last_boxed(text) == content


_PIECES = [
    r"\boxed{",
    "{",
    "}",
    "answer",
    " answer is ",
    "1,",
    "1/",
    "=",
    "(",
    "A",
    " ",
    "\n",
    "9",
    "**",
    r"\text{",
    ".",
    "-",
]


@given(st.lists(st.sampled_from(_PIECES), max_size=40).map("".join))
def test_any_text_gets_a_reward_or_is_unparsable(text: str) -> None:
    for name, gold in [("choice", "A"), ("exact", "answer"), ("number", "1")]:
        with suppress(Unparsable):
            assert verifier(name)(text, gold) in (0.0, 1.0)


@pytest.mark.parametrize("piece", [*_PIECES, "1,2", "1/2/", "answer ", "answer: ", r"\text{}", "{}", "a" * 7])
@pytest.mark.parametrize("name", ["choice", "exact", "number"])
def test_quick_verifiers_take_linear_time(name: str, piece: str) -> None:
    text = piece * (400_000 // len(piece))
    start = time.process_time()
    with suppress(Unparsable):
        verifier(name)(text, {"choice": "A", "exact": "x", "number": "1"}[name])
    assert time.process_time() - start < 1.0
