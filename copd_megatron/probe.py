"""Drift between branches, measured the same way in both phases on fixed validation prompts.

For a student and each of its peers, both at the same version:

- overlap@k and symmetric KL on the states that the *student* visits, on the prompts of both capabilities;
- support and KL(teacher ‖ student) on rollouts of the *teacher* on its own capability;
- KL(π_0 ‖ π_student) on rollouts of the base on the student's capability, which predicts forgetting.

(docs/method.md, "Overlap".) A probe draws from generators of its own and leaves no trace in the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from copd_megatron.actor import Actor, Teacher
from copd_megatron.objectives.drift import low_support
from copd_megatron.policy.batching import Sample
from copd_megatron.randomness import seed_for
from copd_megatron.rollout.types import Prompt, Rollout, Sampling


@dataclass
class Probe:
    """What one branch measures itself against. `prompts` are the validation prompts of each capability; without
    `base` the distance to it is not measured."""

    student: str
    seed: int
    observed: Mapping[str, Teacher]
    base: Teacher | None
    prompts: Mapping[str, Sequence[Prompt]]
    sampling: Sampling
    _spoken_by_base: list[Sample] = field(default_factory=list)

    def samples(self, actor: Actor, version: int) -> tuple[dict[str, list[Sample]], dict[str, float]]:
        """Scored samples by measurement, for the policy's forward pass, and what the engines alone can tell.

        Measurements are `drift/<peer>` (the student's states), `teacher/<peer>` (the peer's) and `base`.
        """
        measured = {}
        numbers = {}
        if self.base is not None:
            if not self._spoken_by_base:  # neither the base nor its prompts ever change
                spoken = self._speak(self.base, self.student, version=0)
                self._spoken_by_base = _samples(self.base.score(spoken, 0))
            measured["base"] = self._spoken_by_base
        visited = {
            name: actor.engine.generate(
                prompts, self.sampling, seed_for(self.seed, "probe", self.student, name, version)
            )
            for name, prompts in self.prompts.items()
        }
        for name, teacher in self.observed.items():
            states = [*visited[self.student], *visited[name]]
            measured[f"drift/{name}"] = _samples(teacher.score(states, version))
            spoken = self._speak(teacher, name, version)
            scored = teacher.score(spoken, version)
            measured[f"teacher/{name}"] = _samples(scored)
            own = actor.engine.score(spoken, 1, self.sampling.temperature)
            few, all_of_them = low_support(
                [score.logprobs for score in own],
                [rollout.teacher.logprobs for rollout in scored if rollout.teacher is not None],
            ).tolist()
            numbers[f"support/{name}"] = few / all_of_them
        return measured, numbers

    def _speak(self, teacher: Teacher, capability: str, version: int) -> list[Rollout]:
        seed = seed_for(self.seed, "probe", teacher.name, "as teacher of", self.student, version)
        return teacher.engine.generate(self.prompts[capability], self.sampling, seed)


def probe_sampling(sampling: Sampling) -> Sampling:
    """One rollout per prompt, otherwise as in training."""
    return replace(sampling, n=1)


def _samples(rollouts: Sequence[Rollout]) -> list[Sample]:
    return [Sample(rollout, source=0) for rollout in rollouts]
