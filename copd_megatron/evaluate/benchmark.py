"""One model on one capability: generate, judge, count."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

from copd_megatron.evaluate.intervals import Estimate, accuracy_of
from copd_megatron.randomness import seed_for
from copd_megatron.rewards.verdict import Verdict
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.rollout.types import Prompt, Sampling

PROMPTS_AT_ONCE = 256
"""Prompts handed to the engine together. It fixes which random numbers a problem gets, so it is not a setting."""


class Grader(Protocol):
    """What judges responses; `rewards.pool.RewardPool` is one."""

    def score(self, items: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        """One verdict per (verifier, response, answer), in order."""
        ...


@dataclass(frozen=True)
class CapabilityResult:
    """What a model can do of one capability.

    `estimate` is the accuracy (avg@n with `samples` n per problem) with its interval. `distinct` of the `problems` are
    different ones; the interval counts repetitions as samples of one problem. `groups` are the accuracies of the kinds
    of problems, if they were told apart. `truncated` is the share of samples cut at the length limit, `mean_length`
    counts tokens. `verdicts` counts samples by what judging came to; `refused` counts problems that could not be made
    into prompts and are left out. `outcomes` are the sum of rewards and the number of samples of each different
    problem, in the order of the suite, which is the same for all models.
    """

    capability: str
    estimate: Estimate
    problems: int
    distinct: int
    samples: int
    truncated: float
    mean_length: float
    verdicts: Mapping[str, int] = field(default_factory=dict)
    groups: Mapping[str, Estimate] = field(default_factory=dict)
    refused: int = 0
    outcomes: tuple[tuple[float, int], ...] = ()


def evaluate(
    engine: RolloutEngine,
    capability: str,
    prompts: Sequence[Prompt],
    grader: Grader,
    sampling: Sampling,
    seed: int,
    group_of: Callable[[Prompt], str] | None = None,
    refused: int = 0,
) -> CapabilityResult:
    """Sample `sampling.n` responses to every prompt and judge them. Raises ValueError without prompts."""
    if not prompts:
        raise ValueError(f"{capability}: no prompts to evaluate on")
    rewards: list[float] = []
    lengths: list[int] = []
    finishes: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    for number, start in enumerate(range(0, len(prompts), PROMPTS_AT_ONCE)):
        batch = prompts[start : start + PROMPTS_AT_ONCE]
        rollouts = engine.generate(batch, sampling, seed_for(seed, "evaluate", capability, number))
        judged = grader.score([(rollout.prompt.verifier, rollout.text, rollout.prompt.answer) for rollout in rollouts])
        rewards += [verdict.reward for verdict in judged]
        lengths += [len(rollout.token_ids) for rollout in rollouts]
        finishes.update(rollout.finish for rollout in rollouts)
        verdicts.update(verdict.status for verdict in judged)
    problems = _by_problem(prompts, rewards, sampling.n)
    members: defaultdict[str, list[list[float]]] = defaultdict(list)
    if group_of is not None:
        for prompt, samples in problems:
            members[group_of(prompt)].append(samples)
    return CapabilityResult(
        capability=capability,
        estimate=accuracy_of([samples for _, samples in problems]),
        problems=len(prompts),
        distinct=len(problems),
        samples=sampling.n,
        truncated=finishes["length"] / len(lengths),
        mean_length=fmean(lengths),
        verdicts=dict(verdicts),
        groups={name: accuracy_of(members[name]) for name in sorted(members)},
        refused=refused,
        outcomes=tuple((math.fsum(samples), len(samples)) for _, samples in problems),
    )


def _by_problem(prompts: Sequence[Prompt], rewards: Sequence[float], n: int) -> list[tuple[Prompt, list[float]]]:
    """Rewards of each different problem. Two prompts of the same text tokens without images are the same problem."""
    problems: dict[object, tuple[Prompt, list[float]]] = {}
    for number, prompt in enumerate(prompts):
        key = prompt.token_ids if prompt.media is None else number
        problems.setdefault(key, (prompt, []))[1].extend(rewards[number * n : (number + 1) * n])
    return list(problems.values())
