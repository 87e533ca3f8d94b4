"""The embedded engine on a model with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from plain_inputs import plain_inputs
from safetensors.torch import load_file

from copd_megatron.errors import WeightsError
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.types import Prompt, Rollout, Sampling
from copd_megatron.weights.hf import HfFolder

END, IMAGE, VIDEO = 1, 4, 5  # of the model in conftest.py
SAMPLED = Sampling(max_new_tokens=12, stop_token_ids=(END,), n=4)
STACK = "model.language_model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def engine(expert_folder: Path) -> EmbeddedEngine:
    return EmbeddedEngine("text", expert_folder)


@pytest.fixture(scope="module")
def reference(expert_folder: Path) -> Any:
    from transformers import Qwen3VLMoeForConditionalGeneration

    return Qwen3VLMoeForConditionalGeneration.from_pretrained(expert_folder).eval()


def plain_logprobs(reference: Any, rollout: Rollout) -> torch.Tensor:
    """Logprobs [R, V] of a plain forward over prompt and response."""
    inputs = plain_inputs(reference, rollout.prompt.token_ids, rollout.prompt.media, rollout.token_ids)
    reference.model.rope_deltas = None
    with torch.no_grad():
        return reference(**inputs).logits[0, len(rollout.prompt.token_ids) - 1 : -1].log_softmax(-1)


def test_logprobs_are_those_of_a_plain_forward(
    engine: EmbeddedEngine, reference: Any, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    rollouts = engine.generate([*prompts, *videos], SAMPLED, seed=3)
    # A plain forward refuses an image token that the model happened to write.
    rollouts = [rollout for rollout in rollouts if not {IMAGE, VIDEO} & set(rollout.token_ids)]
    assert len(rollouts) > len(prompts)

    scores = engine.score(rollouts, 3, 1.0)

    for rollout, score in zip(rollouts, scores, strict=True):
        expected = plain_logprobs(reference, rollout)
        own = expected.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs, own, atol=1e-5, rtol=0)
        torch.testing.assert_close(score.logprobs, own, atol=1e-5, rtol=0)
        torch.testing.assert_close(score.top_logprobs, expected.topk(3).values, atol=1e-5, rtol=0)


def test_experts_come_the_way_round_that_qwen_publishes_them(expert_folder: Path, reference: Any) -> None:
    on_disk = load_file(expert_folder / "model.safetensors")[STACK]
    assert HfFolder(expert_folder).shape(STACK) == (6, 40, 48) != on_disk.shape
    engine = EmbeddedEngine("text", expert_folder, load_weights=False)

    engine.update_weights(HfFolder(expert_folder).tensors(), version=4)

    for name, parameter in engine.model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name


def test_experts_of_another_size_are_refused(expert_folder: Path) -> None:
    weights = dict(HfFolder(expert_folder).tensors())
    for shape in ((5, 40, 48), (6, 41, 48), (40, 48)):
        weights[STACK] = torch.zeros(shape)
        with pytest.raises(WeightsError, match=rf"weight '{STACK}' has shape \[{', '.join(map(str, shape))}\]"):
            EmbeddedEngine("text", expert_folder, load_weights=False).update_weights(weights.items(), version=1)
