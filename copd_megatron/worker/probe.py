"""Drift between branches, measured the same way in both phases on fixed validation prompts.

For a student and each of its peers, both at the same version:

- overlap@k and symmetric KL on the states that the *student* visits, on the prompts of both capabilities;
- support and KL(teacher ‖ student) on rollouts of the *teacher* on its own capability;
- KL(π_0 ‖ π_student) on rollouts of the base on the student's capability, which predicts forgetting;
and the student's reward on both capabilities' prompts (docs/method.md, "Overlap"). A probe draws from generators of its
own and leaves no trace in the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, pvariance

from copd_megatron.objectives.drift import SQUARES, low_support
from copd_megatron.policy.batching import Sample
from copd_megatron.randomness import seed_for
from copd_megatron.rollout.types import Prompt, Rollout, Sampling
from copd_megatron.steering.readings import Estimate, Reading, edge, estimate
from copd_megatron.worker.actor import Actor, Teacher


@dataclass
class Findings:
    """What one probe found: `numbers` by metric, and per peer, by the names of `Reading`, what they are sure to.

    Tokens of one rollout depend on each other, so the standard errors count rollouts.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    estimates: dict[str, dict[str, Estimate | None]] = field(default_factory=dict)

    def of_engines(self, peer: str, low_support: float, count: int) -> None:
        """Take the share of the peer's `count` rollouts that have left the student's support."""
        self.numbers[f"support/{peer}"] = low_support
        self._keep(peer, low_support=estimate(low_support, low_support * (1 - low_support), count))

    def of_rewards(self, capability: str, rewards: Sequence[float], peers: Mapping[str, Teacher]) -> None:
        """Take the rewards of the student's own rollouts on a capability's prompts."""
        self.numbers[f"heldout/{capability}"] = fmean(rewards)
        if capability in peers:
            self._keep(capability, reward=estimate(fmean(rewards), pvariance(rewards), len(rewards)))

    def of_policy(self, measurement: str, stats: Mapping[str, float], count: int) -> None:
        """Take the statistics that the policy's forward pass on `count` rollouts gave for one of `samples`."""
        kind, _, peer = measurement.partition("/")
        if kind == "base":
            self.numbers["kl_to_base"] = stats["kl_forward/0"]
        elif kind == "teacher":
            self.numbers[f"kl_teacher/{peer}"] = stats["kl_forward/0"]
            self._keep(peer, kl_teacher=_estimate(stats, "kl_forward", count))
        else:
            self.numbers |= {f"overlap/{peer}": stats["overlap/0"], f"symkl/{peer}": stats["symkl/0"]}
            self._keep(peer, overlap=_estimate(stats, "overlap", count))

    def readings(self, student: str, teachers: Sequence[str]) -> dict[str, Reading]:
        """What a steered rhythm is told, by edge."""
        return {edge(student, name): Reading(**self.estimates.get(name, {})) for name in teachers}

    def _keep(self, peer: str, **estimates: Estimate | None) -> None:
        self.estimates.setdefault(peer, {}).update(estimates)


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

    def samples(self, actor: Actor, version: int) -> tuple[dict[str, list[Sample]], Findings]:
        """Scored samples by measurement, for the policy's forward pass, and what engines and verifiers alone can tell.

        Measurements are `drift/<peer>` (the student's states), `teacher/<peer>` (the peer's) and `base`.
        """
        measured = {}
        found = Findings()
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
        for name, rollouts in visited.items():
            graded, _ = actor.grade(rollouts)
            found.of_rewards(name, [rollout.reward or 0.0 for rollout in graded], self.observed)
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
            found.of_engines(name, few / all_of_them, int(all_of_them))
        return measured, found

    def _speak(self, teacher: Teacher, capability: str, version: int) -> list[Rollout]:
        seed = seed_for(self.seed, "probe", teacher.name, "as teacher of", self.student, version)
        return teacher.engine.generate(self.prompts[capability], self.sampling, seed)


def probe_sampling(sampling: Sampling) -> Sampling:
    """One rollout per prompt, otherwise as in training."""
    return replace(sampling, n=1)


def _samples(rollouts: Sequence[Rollout]) -> list[Sample]:
    return [Sample(rollout, source=0) for rollout in rollouts]


def _estimate(stats: Mapping[str, float], name: str, count: int) -> Estimate | None:
    mean, square = stats.get(f"{name}/0"), stats.get(f"{name}{SQUARES}/0")
    return estimate(mean, None if mean is None or square is None else square - mean**2, count)
