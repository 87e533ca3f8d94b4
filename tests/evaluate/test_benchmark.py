from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch

from copd_megatron.evaluate import benchmark
from copd_megatron.evaluate.benchmark import evaluate
from copd_megatron.evaluate.intervals import wilson
from copd_megatron.rewards.verdict import Verdict
from copd_megatron.rollout.types import Media, Prompt, Rollout, Sampling, TeacherScores

SAMPLING = Sampling(max_new_tokens=4, stop_token_ids=(0,), n=2)


class ScriptedEngine:
    """Says, as its s-th response to a prompt, the s-th word of the prompt's text; "…" is cut at the length limit."""

    name = "scripted"
    version = 0

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[Rollout]:
        self.seeds.append(seed)
        return [
            Rollout(prompt, (1,) * len(word), torch.zeros(len(word)), "length" if word == "…" else "stop", 0, word)
            for prompt in prompts
            for word in prompt.text.split()[: sampling.n]
        ]

    def score(self, rollouts: Sequence[Rollout], top_k: int, temperature: float) -> list[TeacherScores]:
        raise NotImplementedError

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        raise NotImplementedError


class EqualGrader:
    """Right is what equals the answer; "?" cannot be parsed."""

    def score(self, items: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        return [
            Verdict(0.0, "unparsable") if response == "?" else Verdict(float(response == answer), "ok")
            for _, response, answer in items
        ]


def prompt(number: int, text: str, answer: str = "a", media: Media | None = None) -> Prompt:
    return Prompt(f"p{number}", "letters", (number,), answer, "equal", text, media)


def test_accuracy_is_the_mean_over_all_samples() -> None:
    prompts = [prompt(1, "a a"), prompt(2, "a b"), prompt(3, "? …"), prompt(4, "bbb a")]
    result = evaluate(ScriptedEngine(), "letters", prompts, EqualGrader(), SAMPLING, seed=0)
    assert result.estimate.accuracy == 0.5
    assert (result.problems, result.distinct, result.samples) == (4, 4, 2)
    assert result.truncated == 1 / 8
    assert result.mean_length == 10 / 8
    assert result.verdicts == {"ok": 7, "unparsable": 1}
    assert result.estimate.trials < 8


def test_kinds_of_problems_are_told_apart() -> None:
    prompts = [prompt(1, "a a"), prompt(2, "b b"), prompt(3, "a b"), prompt(4, "a b")]
    result = evaluate(
        ScriptedEngine(), "letters", prompts, EqualGrader(), SAMPLING, seed=0, group_of=lambda p: p.text[0]
    )
    assert {name: estimate.accuracy for name, estimate in result.groups.items()} == {"a": 4 / 6, "b": 0.0}


def test_a_question_asked_twice_is_one_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    media = Media(torch.zeros(4, 6), torch.tensor([[1, 2, 2]]))
    greedy = Sampling(max_new_tokens=4, stop_token_ids=(0,), temperature=0.0)
    texts = [prompt(1, "a"), prompt(1, "a"), prompt(2, "b"), prompt(3, "b")]
    result = evaluate(ScriptedEngine(), "letters", texts, EqualGrader(), greedy, seed=0)
    assert (result.problems, result.distinct) == (4, 3)
    assert result.estimate.accuracy == 0.5
    assert result.estimate.trials < 4
    # Equal words below different pictures are different questions.
    pictures = [prompt(1, "a", media=media), prompt(1, "b", media=media)]
    result = evaluate(ScriptedEngine(), "letters", pictures, EqualGrader(), greedy, seed=0)
    assert (result.distinct, result.estimate) == (2, wilson(0.5, 2))
    monkeypatch.setattr(benchmark, "PROMPTS_AT_ONCE", 1)  # also where they come in different batches
    result = evaluate(ScriptedEngine(), "letters", pictures, EqualGrader(), greedy, seed=0)
    assert (result.distinct, result.estimate) == (2, wilson(0.5, 2))


def test_batches_have_seeds_of_their_own_that_name_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "PROMPTS_AT_ONCE", 2)
    prompts = [prompt(number, "a b") for number in range(5)]
    seeds = []
    for capability, seed in (("letters", 0), ("letters", 0), ("words", 0), ("letters", 1)):
        engine = ScriptedEngine()
        assert evaluate(engine, capability, prompts, EqualGrader(), SAMPLING, seed).estimate.accuracy == 0.5
        assert len(set(engine.seeds)) == 3
        seeds.append(engine.seeds)
    assert seeds[0] == seeds[1]
    assert len({tuple(found) for found in seeds}) == 3


def test_nothing_to_ask_is_an_error() -> None:
    with pytest.raises(ValueError, match="letters: no prompts to evaluate on"):
        evaluate(ScriptedEngine(), "letters", [], EqualGrader(), SAMPLING, seed=0)
