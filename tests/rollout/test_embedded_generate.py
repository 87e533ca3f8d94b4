from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_inputs import generate_inputs, plain_inputs

from copd_megatron.errors import DataError
from copd_megatron.rollout import decoding
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.types import Media, Prompt, Rollout, Sampling

PAD, END, IMAGE, VIDEO = 0, 1, 4, 5  # of the model in conftest.py
GREEDY = Sampling(max_new_tokens=10, stop_token_ids=(END,), temperature=0.0)
SAMPLED = Sampling(max_new_tokens=12, stop_token_ids=(END,), n=4)


@pytest.fixture(scope="module")
def engine(folder: Path) -> EmbeddedEngine:
    return EmbeddedEngine("text", folder)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()


def plain_logprobs(reference: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Logprobs [R, V] of a plain forward over prompt and response."""
    reference.model.rope_deltas = None
    with torch.no_grad():
        logits = reference(
            **plain_inputs(reference, rollout.prompt.token_ids, rollout.prompt.media, rollout.token_ids)
        ).logits[0]
    start = len(rollout.prompt.token_ids) - 1
    return (logits[start:-1] / temperature).log_softmax(-1)


def comparable(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Without those that a plain forward refuses, because the model happened to write an image token."""
    return [rollout for rollout in rollouts if not {IMAGE, VIDEO} & set(rollout.token_ids)]


def test_greedy_tokens_are_those_of_transformers_generate(
    engine: EmbeddedEngine, reference: Any, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    together = engine.generate([*prompts, *videos], GREEDY, seed=0)
    assert {len(rollout.token_ids) for rollout in together} == {10}
    for prompt, rollout in zip([*prompts, *videos], together, strict=True):
        inputs = generate_inputs(reference, prompt.token_ids, prompt.media)
        output = reference.generate(**inputs, do_sample=False, max_new_tokens=10, eos_token_id=END, pad_token_id=PAD)[
            0, len(prompt.token_ids) :
        ]
        assert list(rollout.token_ids) == output.tolist(), prompt.uid
        assert engine.generate([prompt], GREEDY, seed=1)[0].token_ids == rollout.token_ids


def test_logprobs_equal_those_of_a_plain_forward(
    engine: EmbeddedEngine, reference: Any, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    for temperature in (1.0, 0.6):
        sampling = replace(SAMPLED, temperature=temperature)
        rollouts = comparable(engine.generate([*prompts, *videos], sampling, seed=3))
        assert len(rollouts) >= 14
        for rollout in rollouts:
            full = plain_logprobs(reference, rollout, temperature)
            expected = full.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(rollout.logprobs, expected, atol=1e-5, rtol=0)


def test_pitfall_06_rollout_logprobs_are_not_renormalised(
    engine: EmbeddedEngine, reference: Any, prompts: list[Prompt]
) -> None:
    for rollout in comparable(engine.generate(prompts, replace(SAMPLED, top_k=2, top_p=0.9), seed=3)):
        full = plain_logprobs(reference, rollout)
        tokens = torch.tensor(rollout.token_ids)
        torch.testing.assert_close(rollout.logprobs, full.gather(-1, tokens[:, None])[:, 0], atol=1e-5, rtol=0)
        assert (full.topk(2, dim=-1).indices == tokens[:, None]).any(-1).all()


def test_greedy_logprobs_are_at_temperature_one(engine: EmbeddedEngine, reference: Any, prompts: list[Prompt]) -> None:
    for rollout in engine.generate(prompts, GREEDY, seed=0):
        best = plain_logprobs(reference, rollout).max(-1).values
        torch.testing.assert_close(rollout.logprobs, best, atol=1e-5, rtol=0)


def test_rollouts_of_a_prompt_stand_together_in_the_prompts_order(
    engine: EmbeddedEngine, prompts: list[Prompt]
) -> None:
    rollouts = engine.generate(prompts, SAMPLED, seed=0)
    assert [rollout.prompt.uid for rollout in rollouts] == [prompt.uid for prompt in prompts for _ in range(4)]
    assert all(rollout.prompt is prompts[place // 4] for place, rollout in enumerate(rollouts))
    assert len({rollout.token_ids for rollout in rollouts[:4]}) > 1


def assert_same(left: Sequence[Rollout], right: Sequence[Rollout]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish == other.finish
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-5, rtol=0)


def test_rollouts_do_not_depend_on_how_they_are_batched(folder: Path, prompts: list[Prompt]) -> None:
    # Many stop tokens, so that rows end, and are dropped, at many different steps.
    sampling = replace(SAMPLED, stop_token_ids=(END, *range(8, 53, 6)))
    whole = EmbeddedEngine("text", folder).generate(prompts, sampling, seed=5)
    assert len({len(rollout.token_ids) for rollout in whole}) > 4
    for max_rows in (1, 6, 8):
        assert_same(whole, EmbeddedEngine("text", folder, max_rows=max_rows).generate(prompts, sampling, seed=5))


def test_no_more_rows_than_allowed_are_computed_at_a_time(
    folder: Path, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    sample, score = decoding.sample, decoding.score

    def counted(call: Any) -> Any:
        def pass_through(*arguments: Any) -> Any:
            rows.extend(len(argument.hidden) for argument in arguments if isinstance(argument, decoding.Rows))
            return call(*arguments)

        return pass_through

    monkeypatch.setattr(decoding, "sample", counted(sample))
    monkeypatch.setattr(decoding, "score", counted(score))
    engine = EmbeddedEngine("text", folder, max_rows=8)
    rollouts = engine.generate(prompts, replace(SAMPLED, n=3), seed=0)
    assert rows == [6, 6, 6]
    engine.score(rollouts, 1, 1.0)
    assert rows == [6] * 6
    # One prompt's rollouts stay together, whatever the limit.
    engine.generate(prompts[:2], replace(SAMPLED, n=9), seed=0)
    assert rows[6:] == [9, 9]


def test_rollouts_do_not_depend_on_the_other_prompts(
    engine: EmbeddedEngine, prompts: list[Prompt], make_prompt: Callable[..., Prompt]
) -> None:
    whole = engine.generate(prompts, SAMPLED, seed=5)
    others = [make_prompt("something else, much longer than it was", (3, 3)), *prompts[1:3]]
    assert_same(whole[4:12], engine.generate(others, SAMPLED, seed=5)[4:])


def test_equal_seeds_repeat_and_others_do_not(engine: EmbeddedEngine, prompts: list[Prompt]) -> None:
    torch.manual_seed(1)
    first = engine.generate(prompts, SAMPLED, seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = engine.generate(prompts, SAMPLED, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert [r.token_ids for r in first] == [r.token_ids for r in second]
    assert all(torch.equal(one.logprobs, other.logprobs) for one, other in zip(first, second, strict=True))
    assert [r.token_ids for r in first] != [r.token_ids for r in engine.generate(prompts, SAMPLED, seed=8)]


def test_a_response_ends_with_its_first_stop_token(engine: EmbeddedEngine, prompts: list[Prompt]) -> None:
    free = engine.generate(prompts, replace(GREEDY, stop_token_ids=()), seed=0)
    for prompt, rollout in zip(prompts, free, strict=True):
        for place in (0, 3):
            stop = rollout.token_ids[place]
            sampling = replace(GREEDY, stop_token_ids=(END, stop))
            stopped = engine.generate([prompt], sampling, seed=0)[0]
            first = rollout.token_ids.index(stop)
            assert stopped.token_ids == rollout.token_ids[: first + 1]
            assert stopped.finish == "stop"
            assert len(stopped.logprobs) == first + 1
            assert stopped.text == engine.tokenizer.decode(rollout.token_ids[:first], skip_special_tokens=True)


def test_a_response_without_a_stop_token_is_cut_at_the_limit(engine: EmbeddedEngine, prompts: list[Prompt]) -> None:
    for rollout in engine.generate(prompts, replace(GREEDY, max_new_tokens=3), seed=0):
        assert rollout.finish == "length"
        assert len(rollout.token_ids) == len(rollout.logprobs) == 3


def test_a_stop_token_in_the_last_allowed_place_counts_as_a_stop(
    engine: EmbeddedEngine, make_prompt: Callable[..., Prompt]
) -> None:
    prompt = make_prompt("sum 12 34=")
    free = engine.generate([prompt], replace(GREEDY, max_new_tokens=3), seed=0)[0].token_ids
    assert free.index(free[2]) == 2
    sampling = replace(GREEDY, max_new_tokens=3, stop_token_ids=(free[2],))
    assert engine.generate([prompt], sampling, seed=0)[0].finish == "stop"


def test_logprobs_can_enter_a_training_graph(engine: EmbeddedEngine, prompts: list[Prompt]) -> None:
    logprobs = engine.generate(prompts[:1], GREEDY, seed=0)[0].logprobs
    weight = torch.ones_like(logprobs, requires_grad=True)
    (weight * logprobs).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, logprobs)
    assert logprobs.untyped_storage().nbytes() == 4 * len(logprobs)


def test_no_prompts_give_no_rollouts(engine: EmbeddedEngine) -> None:
    assert engine.generate([], SAMPLED, seed=0) == []
    assert engine.score([], 5, 1.0) == []


def test_pitfall_10_image_tokens_without_their_images_are_refused(
    engine: EmbeddedEngine, make_prompt: Callable[..., Prompt]
) -> None:
    seen = make_prompt("what?", (2, 4))
    blind = replace(seen, media=None)
    with pytest.raises(DataError, match=r"prompt what.*: 8 image tokens, but 0 images that make 0"):
        engine.generate([blind], GREEDY, seed=0)
    other = make_prompt("what?", (2, 3))
    with pytest.raises(DataError, match=r"8 image tokens, but 1 images that make 6"):
        engine.generate([replace(seen, media=other.media)], GREEDY, seed=0)


def test_images_whose_patches_are_incomplete_are_refused(
    engine: EmbeddedEngine, make_prompt: Callable[..., Prompt]
) -> None:
    prompt = make_prompt("what?", (2, 4))
    assert prompt.media is not None
    cut = Media(prompt.media.pixel_values[:-4], prompt.media.grid_thw)
    with pytest.raises(DataError, match="pixel_values has 28 patches, grid_thw counts 32"):
        engine.generate([replace(prompt, media=cut)], GREEDY, seed=0)


def test_pitfall_10_videos_and_their_tokens_must_agree(
    engine: EmbeddedEngine, make_prompt: Callable[..., Prompt]
) -> None:
    seen = make_prompt("what?", (2, 2, 3), uid="row 7")
    assert seen.media is not None
    with pytest.raises(DataError, match=r"prompt row 7: 12 video tokens, but 0 videos that make 0"):
        engine.generate([replace(seen, media=None)], GREEDY, seed=0)
    with pytest.raises(DataError, match=r"prompt row 7: 0 image tokens, but 1 images that make 12"):
        engine.generate([replace(seen, media=Media(seen.media.pixel_values, seen.media.grid_thw))], GREEDY, seed=0)
    # As Qwen2.5-VL has it: the frames of a Qwen3-VL's video stand apart.
    whole = make_prompt("what?", (2, 2, 3), seconds=1.0, uid="row 8")
    assert len(engine.generate([whole], GREEDY, seed=0)) == 1
    order = make_prompt("what?", (1, 2), (1, 1, 2), uid="row 9")
    assert order.media is not None
    swapped = replace(order.media, videos=(0,))
    with pytest.raises(DataError, match=r"prompt row 9: the video at token 1 is interrupted"):
        engine.generate([replace(order, media=swapped)], GREEDY, seed=0)


def test_prompts_that_no_model_can_read_are_refused(engine: EmbeddedEngine, make_prompt: Callable[..., Prompt]) -> None:
    prompt = make_prompt("9", uid="row 7")
    with pytest.raises(DataError, match="prompt row 7: no tokens"):
        engine.generate([replace(prompt, token_ids=())], GREEDY, seed=0)
    with pytest.raises(DataError, match="prompt row 7: token 151643 is not in the model's vocabulary of 53"):
        engine.generate([replace(prompt, token_ids=(9, 151643))], GREEDY, seed=0)
    with pytest.raises(DataError, match="prompt row 7: 1 video tokens, but 0 videos that make 0"):
        engine.generate([replace(prompt, token_ids=(VIDEO, 9))], GREEDY, seed=0)
