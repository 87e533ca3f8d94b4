"""A policy of 30,000 parameters and random samples with and without pictures, for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from copd_megatron.data.mini.model import ModelSize, build
from copd_megatron.objectives.vocabulary import Vocabulary
from copd_megatron.policy.batching import NATIVE, Sample
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.policy.packed import Signals
from copd_megatron.randomness import generator
from copd_megatron.rollout.types import Media, Prompt, Rollout, TeacherScores

SIZE = ModelSize(hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=48, vision_hidden=24, vision_layers=2,
                 vision_heads=2, vision_mlp=32, init=0.2)  # fmt: skip
PATCH_FEATURES = 3 * 2 * SIZE.patch**2


def base_folder(folder: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with random weights."""
    build(folder, seed, SIZE)
    return folder


def new_policy(
    base: Path, layout: Layout | None = None, max_tokens: int = 1000, precision: str = "fp32", **settings: Any
):
    """A `Policy` with a rate that shows; `layout` must have been initialised."""
    from copd_megatron.policy.trainer import Policy

    return Policy(base, layout or Layout(), OptimizerSettings(**{"lr": 1e-2, **settings}), precision, max_tokens)


def make_samples(base: Path, prompts: int, group: int, seed: int = 0, teachers: bool = False) -> list[Sample]:
    """`group` responses to each of `prompts` prompts; every other prompt has pictures. With `teachers` half of the
    groups are cross samples of teacher 0."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    draw = generator(seed, "samples")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(8, 50, (count,), generator=draw).tolist())

    def question(number: int) -> Prompt:
        if number % 2 == 0:
            return Prompt(f"text{number}", "text", ids(5 + number), "", "exact", "")
        grids = torch.tensor([[1, 2, 4], [1, 4, 4]])[: 1 + number % 3 % 2]
        patches = int(grids.prod(1).sum())
        tokens: tuple[int, ...] = ()
        for grid in grids:
            pads = int(grid.prod()) // SIZE.merge**2
            tokens += (config.vision_start_token_id, *[config.image_token_id] * pads, config.vision_end_token_id)
        media = Media(torch.randn(patches, PATCH_FEATURES, generator=draw), grids)
        return Prompt(f"image{number}", "image", tokens + ids(3), "", "exact", "", media)

    samples = []
    for number in range(prompts):
        prompt = question(number)
        source = number // 2 % 2 - 1 if teachers else NATIVE
        for member in range(group):
            size = 1 + (number + 3 * member) % 6
            teacher = None
            if source != NATIVE:
                top_ids = torch.arange(4).expand(size, 4)
                teacher = TeacherScores("peer", 0, torch.full((size,), -2.0), top_ids, torch.full((size, 4), -3.0))
            rollout = Rollout(prompt, ids(size), torch.full((size,), -4.0), "stop", 0, "", None, teacher)
            advantage = float(torch.randn((), generator=draw)) if source == NATIVE else 0.0
            samples.append(Sample(rollout, source, advantage))
    return samples


def gathered(logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
    """All columns from those of each rank, with gradient: in the plainest way, for models that are tiny."""
    return GatherColumns.apply(logits, vocabulary)


class GatherColumns(torch.autograd.Function):
    """Each rank's columns, put where they belong and added up; the gradient of a rank's own columns is its part."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
        ctx.columns = slice(vocabulary.start, vocabulary.start + logits.shape[1])
        whole = logits.new_zeros(len(logits), vocabulary.size)
        whole[:, ctx.columns] = logits
        torch.distributed.all_reduce(whole, group=vocabulary.group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[:, ctx.columns], None


def toy_loss(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, vocabulary: Vocabulary | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A policy gradient, an entropy bonus, and a pull towards the teacher: nothing in it is linear in the logits."""
    if vocabulary is not None:
        logits = gathered(logits, vocabulary)
    logprobs = logits.float().log_softmax(-1)
    chosen = logprobs.gather(1, targets[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(1)
    per_token = -signals.advantage * chosen - 0.1 * entropy
    if signals.teacher_logprobs is not None:
        per_token = per_token + (signals.source >= 0) * (chosen - signals.teacher_logprobs) ** 2
    stats = {
        "entropy": torch.stack([entropy.detach().sum(), torch.tensor(float(len(targets)))]),
        "cross": torch.stack([chosen.detach()[signals.source >= 0].sum(), (signals.source >= 0).sum()]),
    }
    return (signals.weight * per_token).sum(), stats


def gradients(policy: Any) -> dict[str, torch.Tensor]:
    """The gradients of the last update by Hugging Face name (on the replica's leader)."""
    parameters = list(policy.model.module.parameters())
    weights = [parameter.data.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    named = {name: tensor.clone() for name, tensor in policy.named_weights()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return named


def weights_of(policy: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights by Hugging Face name."""
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in policy.named_weights()
    }


def worst_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference of two tensors of a name, relative to the largest entry of the second."""
    assert one.keys() == other.keys()
    with torch.no_grad():
        return max(
            float((one[name] - other[name]).abs().max() / other[name].abs().max().clamp(min=1e-6)) for name in one
        )
