from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_inputs import plain_inputs

from copd_megatron.errors import DataError, WeightsError
from copd_megatron.rollout import decoding
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.prompt_batch import PromptBatch
from copd_megatron.rollout.types import Prompt, Rollout, Sampling, TeacherScores

END = 1  # of the model in conftest.py
VOCABULARY = 53


@pytest.fixture(scope="module")
def teacher(tied_folder: Path) -> EmbeddedEngine:
    return EmbeddedEngine("image", tied_folder)


@pytest.fixture(scope="module")
def rollouts(prompts: list[Prompt], videos: list[Prompt]) -> list[Rollout]:
    """Responses of many lengths (1 to 9 tokens) that no model has sampled, in an order that mixes the prompts."""
    made = []
    for place in range(18):
        prompt = [*prompts, *videos][(5 * place) % 9]
        ids = tuple(6 + (7 * place + 5 * step) % 40 for step in range(place % 9))
        made.append(Rollout(prompt, (*ids, END), torch.zeros(len(ids) + 1), "stop", 3, ""))
    return made


@pytest.fixture(scope="module")
def expected(tied_folder: Path, rollouts: list[Rollout]) -> list[torch.Tensor]:
    """Logits [R, V] of a plain transformers forward over each prompt and response."""
    from transformers import Qwen3VLForConditionalGeneration

    model: Any = Qwen3VLForConditionalGeneration.from_pretrained(tied_folder).eval()
    logits = []
    for rollout in rollouts:
        inputs = plain_inputs(model, rollout.prompt.token_ids, rollout.prompt.media, rollout.token_ids)
        model.model.rope_deltas = None
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, len(rollout.prompt.token_ids) - 1 : -1])
    return logits


def assert_scores(
    scores: Sequence[TeacherScores], rollouts: Sequence[Rollout], expected: Sequence[torch.Tensor], temperature: float
) -> None:
    for score, rollout, logits in zip(scores, rollouts, expected, strict=True):
        full = (logits / temperature).log_softmax(-1)
        own = full.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(score.logprobs, own, atol=1e-5, rtol=0)
        top = full.topk(score.top_ids.shape[1], dim=-1)
        torch.testing.assert_close(score.top_logprobs, top.values, atol=1e-5, rtol=0)
        # The ids may swap where two tokens are equally likely; their logprobs may not.
        torch.testing.assert_close(full.gather(-1, score.top_ids), score.top_logprobs, atol=1e-5, rtol=0)
        assert score.top_ids.dtype == torch.int64
        assert score.logprobs.dtype == score.top_logprobs.dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_equal_those_of_a_plain_forward(
    teacher: EmbeddedEngine, rollouts: list[Rollout], expected: list[torch.Tensor], temperature: float
) -> None:
    scores = teacher.score(rollouts, 5, temperature)
    assert_scores(scores, rollouts, expected, temperature)
    assert all(score.top_ids.shape == (len(r.token_ids), 5) for score, r in zip(scores, rollouts, strict=True))
    assert all((score.top_logprobs.diff(dim=1) <= 0).all() for score in scores)


def test_temperature_zero_scores_as_one(teacher: EmbeddedEngine, rollouts: list[Rollout]) -> None:
    for greedy, one in zip(teacher.score(rollouts, 2, 0.0), teacher.score(rollouts, 2, 1.0), strict=True):
        assert torch.equal(greedy.logprobs, one.logprobs)


def test_scores_do_not_depend_on_how_rollouts_are_batched(
    tied_folder: Path, rollouts: list[Rollout], expected: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    for max_rows in (1, 4):
        engine = EmbeddedEngine("image", tied_folder, max_rows=max_rows)
        assert_scores(engine.score(rollouts, 5, 1.0), rollouts, expected, 1.0)


def test_logits_can_be_read_at_the_states_that_a_teacher_has_scored(
    teacher: EmbeddedEngine,
    folder: Path,
    rollouts: list[Rollout],
    expected: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "LOGITS_AT_ONCE", 7 * VOCABULARY)
    scores = EmbeddedEngine("text", folder).score(rollouts, 3, 1.0)
    scored = [replace(rollout, teacher=score) for rollout, score in zip(rollouts, scores, strict=True)]
    found = teacher.values(scored, lambda *given: given)
    for rollout, score, whole, (logits, ids, top_ids, top_logprobs) in zip(
        rollouts, scores, expected, found, strict=True
    ):
        torch.testing.assert_close(logits, whole, atol=1e-4, rtol=0)
        assert ids.tolist() == list(rollout.token_ids)
        assert torch.equal(top_ids, score.top_ids)
        assert torch.equal(top_logprobs, score.top_logprobs)
    with pytest.raises(ValueError, match="found one that none has"):
        teacher.values([*scored, rollouts[0]], lambda *given: given)


def test_a_prompt_is_computed_once_for_all_its_rollouts(
    teacher: EmbeddedEngine, rollouts: list[Rollout], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    prefill = decoding.prefill

    def counted(model: Any, batch: PromptBatch, room: int) -> decoding.Rows:
        computed.append(len(batch.token_ids))
        return prefill(model, batch, room)

    monkeypatch.setattr(decoding, "prefill", counted)
    teacher.score(rollouts, 1, 1.0)
    assert sum(computed) == len({rollout.prompt.uid for rollout in rollouts}) == 9
    teacher.generate([rollouts[0].prompt], Sampling(2, (END,), n=4), seed=0)
    assert sum(computed) == 10


def test_more_than_the_vocabulary_means_all_of_it(teacher: EmbeddedEngine, rollouts: list[Rollout]) -> None:
    for score in teacher.score(rollouts[:3], 1000, 1.0):
        assert score.top_ids.shape[1] == VOCABULARY
        torch.testing.assert_close(score.top_logprobs.exp().sum(-1), torch.ones(len(score.logprobs)))


def test_no_top_tokens_are_given_where_none_are_asked_for(teacher: EmbeddedEngine, rollouts: list[Rollout]) -> None:
    for score, rollout in zip(teacher.score(rollouts, 0, 1.0), rollouts, strict=True):
        assert score.top_ids.shape == score.top_logprobs.shape == (len(rollout.token_ids), 0)


def test_negative_settings_are_refused(teacher: EmbeddedEngine, rollouts: list[Rollout]) -> None:
    with pytest.raises(ValueError, match=r"top_k is -1 and temperature 1\.0"):
        teacher.score(rollouts, -1, 1.0)


def test_the_teacher_signs_its_scores_with_name_and_version(tied_folder: Path, rollouts: list[Rollout]) -> None:
    engine = EmbeddedEngine("image", tied_folder)
    assert {(score.teacher, score.version) for score in engine.score(rollouts, 1, 1.0)} == {("image", 0)}
    engine.update_weights(engine.model.state_dict().items(), version=12)
    assert {(score.teacher, score.version) for score in engine.score(rollouts, 1, 1.0)} == {("image", 12)}


def test_a_model_scores_its_own_rollouts_as_it_sampled_them(teacher: EmbeddedEngine, prompts: list[Prompt]) -> None:
    rollouts = teacher.generate(prompts, Sampling(12, (END, 9, 30), n=4, temperature=0.8), seed=2)
    for rollout, score in zip(rollouts, teacher.score(rollouts, 3, 0.8), strict=True):
        torch.testing.assert_close(rollout.logprobs, score.logprobs, atol=2e-5, rtol=0)


def test_scores_can_enter_a_training_graph(teacher: EmbeddedEngine, rollouts: list[Rollout]) -> None:
    score = teacher.score(rollouts[:3], 4, 1.0)[1]
    weight = torch.ones_like(score.top_logprobs, requires_grad=True)
    (weight * score.top_logprobs).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, score.top_logprobs)
    assert score.top_logprobs.untyped_storage().nbytes() == 4 * score.top_logprobs.numel()


def test_pitfall_10_images_reach_the_teacher_as_they_reached_the_student(
    teacher: EmbeddedEngine, rollouts: list[Rollout], expected: list[torch.Tensor]
) -> None:
    with_images = [place for place, rollout in enumerate(rollouts) if rollout.prompt.media is not None]
    seen = [rollouts[place] for place in with_images]
    assert_scores(teacher.score(seen, 5, 1.0), seen, [expected[place] for place in with_images], 1.0)
    # What a teacher of other pixels would have said is told apart by the same comparison.
    first = seen[0]
    media = first.prompt.media
    assert media is not None
    dark = replace(media, pixel_values=torch.zeros_like(media.pixel_values))
    other = teacher.score([replace(first, prompt=replace(first.prompt, media=dark))], 5, 1.0)[0]
    assert (other.logprobs - teacher.score([first], 5, 1.0)[0].logprobs).abs().max() > 0.01


def test_pitfall_10_a_blind_teacher_is_an_error(
    teacher: EmbeddedEngine, rollouts: list[Rollout], make_prompt: Callable[..., Prompt]
) -> None:
    blind = replace(rollouts[0], prompt=replace(make_prompt("what?", (2, 4)), media=None))
    with pytest.raises(DataError, match="8 image tokens, but 0 images that make 0"):
        teacher.score([rollouts[1], blind], 5, 1.0)


def test_responses_of_another_vocabulary_are_refused(teacher: EmbeddedEngine, rollouts: list[Rollout]) -> None:
    with pytest.raises(DataError, match=r"response to prompt .*: token 151645 is not in the model's vocabulary of 53"):
        teacher.score([replace(rollouts[0], token_ids=(9, 151645))], 5, 1.0)


def test_an_engine_without_weights_does_not_score(tied_folder: Path, rollouts: list[Rollout]) -> None:
    with pytest.raises(WeightsError, match="'image' has no complete set of weights"):
        EmbeddedEngine("image", tied_folder, load_weights=False).score(rollouts, 5, 1.0)
