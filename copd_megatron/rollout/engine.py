"""What every rollout engine can do. A peer's engine is at the same time the teacher (method.md, "Algorithm")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from copd_megatron.errors import CopdError
from copd_megatron.rollout.types import Prompt, Rollout, Sampling, TeacherScores


class EngineLost(CopdError):
    """The engine of `branch` cannot be used until it has been given weights again: `reason`."""

    def __init__(self, branch: str, reason: str) -> None:
        super().__init__(f"engine of branch {branch!r}: {reason}")
        self.branch = branch


class Scoring(Protocol):
    """Scores that are asked for one by one. Rollouts may be added from any thread."""

    def add(self, place: int, rollout: Rollout) -> None:
        """Ask for the scores of `rollout`; they will be the result at `place`."""
        ...

    def results(self) -> list[TeacherScores]:
        """All scores in the order of their places, when the last has come."""
        ...


class RolloutEngine(Protocol):
    """Samples from, and scores with, one version of one branch's weights. All methods may raise EngineLost."""

    name: str
    version: int

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, the rollouts of one prompt next to each other, in the prompts' order.

        `finished` is told each rollout and its place, as early as it is there, maybe from another thread.
        """
        ...

    def score(self, rollouts: Sequence[Rollout], top_k: int, temperature: float) -> list[TeacherScores]:
        """Log-probabilities of the rollouts' own tokens and of the `top_k` likeliest, one result per rollout."""
        ...

    def begin_scoring(self, top_k: int, temperature: float) -> Scoring:
        """The same for rollouts that come one by one."""
        ...

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the Hugging Face named tensors as the weights of `version`. All parameters must be there."""
        ...

    def counts(self) -> Counter[str]:
        """What happened since the last call, by the name of the metric (docs of observe/metrics.py)."""
        ...

    def close(self) -> None:
        """Let go of what the engine holds in this process."""
        ...
