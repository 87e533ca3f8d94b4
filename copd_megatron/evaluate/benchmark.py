"""One model on one set of problems: generate, judge, count."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from statistics import fmean
from typing import Protocol

from copd_megatron.evaluate.intervals import accuracy_of
from copd_megatron.evaluate.results import BenchmarkResult
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


def evaluate(
    engine: RolloutEngine,
    name: str,
    prompts: Iterable[Prompt],
    grader: Grader,
    sampling: Sampling,
    seed: int,
    group_of: Callable[[Prompt], str] | None = None,
) -> BenchmarkResult:
    """Sample `sampling.n` responses to every prompt and judge them. Prompts are taken as they are needed and not kept:
    those of videos are large. Raises ValueError without prompts."""
    problems: dict[object, list[float]] = {}
    kinds: dict[object, str] = {}
    lengths: list[int] = []
    finishes: Counter[str] = Counter()
    verdicts: Counter[str] = Counter()
    waiting, asked = iter(prompts), 0
    while batch := list(islice(waiting, PROMPTS_AT_ONCE)):
        rollouts = engine.generate(batch, sampling, seed_for(seed, "evaluate", name, asked // PROMPTS_AT_ONCE))
        judged = grader.score([(rollout.prompt.verifier, rollout.text, rollout.prompt.answer) for rollout in rollouts])
        rewards = [verdict.reward for verdict in judged]
        for number, prompt in enumerate(batch):
            # Two prompts of the same text tokens without images are the same problem.
            key = prompt.token_ids if prompt.media is None else asked + number
            problems.setdefault(key, []).extend(rewards[number * sampling.n : (number + 1) * sampling.n])
            if group_of is not None:
                kinds.setdefault(key, group_of(prompt))
        lengths += [len(rollout.token_ids) for rollout in rollouts]
        finishes.update(rollout.finish for rollout in rollouts)
        verdicts.update(verdict.status for verdict in judged)
        asked += len(batch)
    if not asked:
        raise ValueError(f"{name}: no prompts to evaluate on")
    members: defaultdict[str, list[list[float]]] = defaultdict(list)
    for problem, kind in kinds.items():
        members[kind].append(problems[problem])
    return BenchmarkResult(
        name=name,
        estimate=accuracy_of(list(problems.values())),
        problems=asked,
        distinct=len(problems),
        samples=sampling.n,
        truncated=finishes["length"] / len(lengths),
        mean_length=fmean(lengths),
        verdicts=dict(verdicts),
        groups={kind: accuracy_of(members[kind]) for kind in sorted(members)},
        outcomes=tuple((math.fsum(samples), len(samples)) for samples in problems.values()),
    )
