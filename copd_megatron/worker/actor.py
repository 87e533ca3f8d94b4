"""The part of a branch that samples and judges: engine, prompt streams, teachers and verifiers.

There is one in every data-parallel replica of the gang, on the replica's first rank; the replica's other ranks get the
finished samples from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from copd_megatron.data.stream import PromptStream
from copd_megatron.errors import CopdError
from copd_megatron.objectives.grpo import group_advantages
from copd_megatron.policy.batching import NATIVE, Sample
from copd_megatron.randomness import seed_for
from copd_megatron.rewards.pool import RewardPool
from copd_megatron.rollout.engine import RolloutEngine, Scoring
from copd_megatron.rollout.types import Rollout, Sampling, TeacherScores


@dataclass
class Teacher:
    """A peer's engine, and what the student asks of it. `index` is its place among the student's teachers; a `frozen`
    one is a finished expert, whose weights stay."""

    name: str
    index: int
    engine: RolloutEngine
    top_k: int
    temperature: float
    frozen: bool = False

    def score(self, rollouts: Sequence[Rollout], version: int) -> list[Rollout]:
        """The same rollouts with this teacher's scores. Raises CopdError if the teacher is not at `version`."""
        self._check(version)
        return attach(rollouts, self.engine.score(rollouts, self.top_k, self.temperature))

    def begin(self, version: int) -> Scoring:
        """The same for rollouts that come one by one."""
        self._check(version)
        return self.engine.begin_scoring(self.top_k, self.temperature)

    def _check(self, version: int) -> None:
        if not self.frozen and self.engine.version != version:
            raise CopdError(
                f"teacher {self.name!r} has weights of version {self.engine.version}, the student needs {version}"
            )


def attach(rollouts: Sequence[Rollout], scores: Sequence[TeacherScores]) -> list[Rollout]:
    """The rollouts with their scores."""
    return [replace(rollout, teacher=score) for rollout, score in zip(rollouts, scores, strict=True)]


@dataclass
class Actor:
    """Samples with the branch's own weights, from any capability's prompts.

    `sends` says that this replica hands the branch's weights to the engine, where replicas share one.
    """

    branch: str
    seed: int
    rank: int
    engine: RolloutEngine
    streams: Mapping[str, PromptStream]
    teachers: Mapping[str, Teacher]
    rewards: RewardPool
    sampling: Sampling
    normalise_std: bool
    sends: bool = True

    def sampling_task(self, capability: str, prompts: int, step: int) -> Callable[[], list[Rollout]]:
        """What gives G rollouts for each of the next `prompts` prompts of `capability`.

        The prompts are drawn now; the task can be tried again. The draw depends on `step` alone.
        """
        drawn, seed = self.streams[capability].draw(prompts), self._seed(capability, step)
        return lambda: self.engine.generate(drawn, self.sampling, seed)

    def lesson_task(self, teacher: Teacher, prompts: int, step: int, version: int) -> Callable[[], list[Rollout]]:
        """What gives such rollouts on the teacher's capability, with its scores at `version`.

        Each is scored as soon as it is there, while the others are still being sampled. Tried again, the task samples
        nothing a second time.
        """
        drawn, seed = self.streams[teacher.name].draw(prompts), self._seed(teacher.name, step)
        sampled: list[Rollout] = []

        def attempt() -> list[Rollout]:
            scoring = teacher.begin(version)
            if sampled:
                for place, rollout in enumerate(sampled):
                    scoring.add(place, rollout)
            else:
                sampled.extend(self.engine.generate(drawn, self.sampling, seed, finished=scoring.add))
            return attach(sampled, scoring.results())

        return attempt

    def _seed(self, capability: str, step: int) -> int:
        return seed_for(self.seed, "rollout", self.branch, capability, step, self.rank)

    def grade(self, rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Counter[str]]:
        """Rollouts with rewards, and how many verdicts were not "ok", by status."""
        verdicts = self.rewards.score([(r.prompt.verifier, r.text, r.prompt.answer) for r in rollouts])
        graded = [replace(r, reward=verdict.reward) for r, verdict in zip(rollouts, verdicts, strict=True)]
        return graded, Counter(verdict.status for verdict in verdicts if verdict.status != "ok")

    def native_samples(self, graded: Sequence[Rollout]) -> tuple[list[Sample], int]:
        """Training samples with group advantages, and the number of groups without reward variance.

        Such groups have advantage 0 everywhere and so no gradient: all but one are left out of the computation (they
        still count in the mean, whose denominator the caller gives).
        """
        if not graded:
            return [], 0
        rewards = torch.tensor([rollout.reward for rollout in graded], dtype=torch.float32)
        advantages, flat = group_advantages(rewards, self.sampling.n, self.normalise_std)
        samples = [
            Sample(rollout, NATIVE, float(advantage)) for rollout, advantage in zip(graded, advantages, strict=True)
        ]
        kept = (~flat).repeat_interleave(self.sampling.n)
        if not kept.any():
            kept[: self.sampling.n] = True
        return [sample for sample, keep in zip(samples, kept.tolist(), strict=True) if keep], int(flat.sum())

    def cross_samples(self, scored: Mapping[str, Sequence[Rollout]]) -> list[Sample]:
        """Training samples of rollouts that teachers have scored."""
        return [
            Sample(rollout, self.teachers[name].index, 0.0) for name, rollouts in scored.items() for rollout in rollouts
        ]
