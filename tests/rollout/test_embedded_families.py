"""The embedded engine on families other than Qwen3-VL: as transformers computes, and as the policy computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_inputs import plain_inputs
from tiny_models import IMAGE, VIDEO, config_of, save

from copd_megatron.errors import DataError, WeightsError
from copd_megatron.policy import layout as layouts
from copd_megatron.policy.batching import Sample
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.types import Prompt, Rollout, Sampling
from copd_megatron.weights.hf import HfFolder, read_config

END = 1  # of the model in conftest.py
SAMPLED = Sampling(max_new_tokens=12, stop_token_ids=(END,), n=4)
FAMILIES = ["qwen3", "qwen3_tied", "qwen3_moe", "qwen2_5_vl", "qwen2_5_vl_tied"]


@pytest.fixture(scope="module", params=FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), config_of(request.param))


@pytest.fixture(scope="module")
def policy(model_dir: Path) -> Iterator[Any]:
    from copd_megatron.policy.trainer import Policy

    layouts.initialize(Layout())
    yield Policy(model_dir, Layout(), OptimizerSettings(lr=1e-3), "fp32", 1000)
    layouts.shutdown()


@pytest.fixture(scope="module")
def questions(
    model_dir: Path,
    prompts: list[Prompt],
    make_prompt: Callable[..., Prompt],
    make_videos: Callable[..., list[Prompt]],
) -> list[Prompt]:
    """Text of several lengths and, where the model sees them, images and videos."""
    if "vision_config" in read_config(model_dir):
        return [*prompts, *make_videos(seconds=0.7)]
    return [make_prompt("sum 12 34="), make_prompt("9"), make_prompt("compare these two."), make_prompt("what?")]


def reference(model_dir: Path) -> Any:
    import transformers

    return getattr(transformers, read_config(model_dir)["architectures"][0]).from_pretrained(model_dir).eval()


def plain_logprobs(model_dir: Path, rollouts: list[Rollout]) -> list[torch.Tensor]:
    """Logprobs [R, V] of a plain transformers forward over each prompt and response."""
    model = reference(model_dir)
    found = []
    for rollout in rollouts:
        inputs = plain_inputs(model, rollout.prompt.token_ids, rollout.prompt.media, rollout.token_ids)
        model.model.rope_deltas = None
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(rollout.prompt.token_ids) - 1 : -1]
        found.append(logits.log_softmax(-1))
    return found


def test_logprobs_are_those_of_a_plain_forward(model_dir: Path, questions: list[Prompt]) -> None:
    engine = EmbeddedEngine("text", model_dir)

    rollouts = engine.generate(questions, SAMPLED, seed=3)
    # A plain forward refuses an image token that the model happened to write.
    rollouts = [rollout for rollout in rollouts if not {IMAGE, VIDEO} & set(rollout.token_ids)]
    assert len(rollouts) > len(questions)
    scores = engine.score(rollouts, 3, 1.0)

    assert max(len(rollout.token_ids) for rollout in rollouts) > 6
    for rollout, score, expected in zip(rollouts, scores, plain_logprobs(model_dir, rollouts), strict=True):
        own = expected.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs, own, atol=1e-5, rtol=0)
        torch.testing.assert_close(score.logprobs, own, atol=1e-5, rtol=0)
        torch.testing.assert_close(score.top_logprobs, expected.topk(3).values, atol=1e-5, rtol=0)


def test_logprobs_are_the_policys_before_and_after_an_update(
    model_dir: Path, policy: Any, questions: list[Prompt]
) -> None:
    from copd_megatron.objectives.vocabulary import token_logprobs

    def loss(logits: Any, targets: Any, signals: Any, vocabulary: Any = None) -> Any:
        return -(signals.advantage * token_logprobs(logits, targets, 1.0, vocabulary)).sum(), {}

    engine = EmbeddedEngine("text", model_dir)
    before = engine.generate(questions, SAMPLED, seed=4)
    assert_same(before, policy.logprobs([Sample(rollout) for rollout in before]))

    policy.update([Sample(rollout, advantage=1.0) for rollout in before], loss)
    engine.update_weights(policy.named_weights(), version=policy.version)
    after = engine.generate(questions, SAMPLED, seed=4)

    assert_same(after, policy.logprobs([Sample(rollout) for rollout in after]))
    scores = engine.score(before, 0, 1.0)
    assert sum(float(score.logprobs.sum()) for score in scores) > sum(float(each.logprobs.sum()) for each in before) + 1


def assert_same(rollouts: list[Rollout], logprobs: list[torch.Tensor]) -> None:
    for rollout, found in zip(rollouts, logprobs, strict=True):
        torch.testing.assert_close(rollout.logprobs, found, atol=1e-5, rtol=0)


def test_a_prompt_with_images_is_refused_where_text_is_all_the_model_takes(
    model_dir: Path, policy: Any, make_prompt: Callable[..., Prompt]
) -> None:
    seen = make_prompt("what?", (2, 4), uid="row 7")
    family = policy.hf_config.model_type
    if family == "qwen2_5_vl":
        assert len(EmbeddedEngine("text", model_dir).generate([seen], SAMPLED, seed=0)) == SAMPLED.n
        assert policy.positions(seen).shape == (3, len(seen.token_ids))
        return

    with pytest.raises(DataError, match=rf"prompt row 7: has images or videos, but a '{family}' takes text alone"):
        EmbeddedEngine("text", model_dir).generate([seen], SAMPLED, seed=0)
    with pytest.raises(DataError, match=rf"prompt row 7: has images or videos, but a '{family}' takes text alone"):
        policy.positions(seen)


def test_every_published_weight_has_its_own_place(model_dir: Path) -> None:
    published = dict(HfFolder(model_dir).tensors())
    engine = EmbeddedEngine("text", model_dir, load_weights=False)

    engine.update_weights(published.items(), version=1)

    expected = reference(model_dir)
    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_image_tokens_without_their_images_are_refused(tmp_path: Path, make_prompt: Callable[..., Prompt]) -> None:
    engine = EmbeddedEngine("text", save(tmp_path, config_of("qwen2_5_vl")))
    blind = replace(make_prompt("what?", (2, 4)), media=None)

    with pytest.raises(DataError, match=r"8 image tokens, but 0 images that make 0"):
        engine.generate([blind], SAMPLED, seed=0)


def test_a_missing_or_misshapen_expert_is_named(tmp_path: Path) -> None:
    save(tmp_path, config_of("qwen3_moe"))
    weights = dict(HfFolder(tmp_path).tensors())
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    engine = EmbeddedEngine("text", tmp_path, load_weights=False)

    kept = weights.pop(name)
    with pytest.raises(WeightsError, match=f"missing weights: {name}"):
        engine.update_weights(weights.items(), version=1)
    with pytest.raises(WeightsError, match=rf"weight '{name}' has shape \[48, 40\], the model expects \[40, 48\]"):
        engine.update_weights({**weights, name: kept.T}.items(), version=1)


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    config = config_of("qwen3")
    config.use_sliding_window = True
    save(tmp_path, config)

    with pytest.raises(WeightsError, match=r"config\.json: use_sliding_window is true"):
        EmbeddedEngine("text", tmp_path)
