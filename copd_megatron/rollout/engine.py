"""What every rollout engine can do. A peer's engine is at the same time the teacher (method.md, "Algorithm")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch

from copd_megatron.rollout.types import Prompt, Rollout, Sampling, TeacherScores


class RolloutEngine(Protocol):
    """Samples from, and scores with, one version of one branch's weights."""

    name: str
    version: int

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, the rollouts of one prompt next to each other, in the prompts' order."""
        ...

    def score(self, rollouts: Sequence[Rollout], top_k: int, temperature: float) -> list[TeacherScores]:
        """Log-probabilities of the rollouts' own tokens and of the `top_k` likeliest, one result per rollout."""
        ...

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the Hugging Face named tensors as the weights of `version`. All parameters must be there."""
        ...
