"""How long an update takes, by activity: sampling, scoring, training, hand-over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copd_megatron.plan.compute import Training, forward_operations
from copd_megatron.plan.engines import Speed
from copd_megatron.plan.geometry import Geometry
from copd_megatron.plan.traffic import Transfer
from copd_megatron.plan.workload import Portion, Update


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update of a branch. `score` is what its engine computes for its students; `wait` for peers, who
    take longer."""

    rollout: float
    score: float
    train: float
    communicate: float
    hand_over: float
    wait: float = 0.0

    @property
    def busy(self) -> float:
        """Without waiting."""
        return self.rollout + self.score + self.train + self.communicate + self.hand_over

    @property
    def total(self) -> float:
        """With it."""
        return self.busy + self.wait


def rollout_seconds(update: Update, speed: Speed, servers: int, seed: int = 0) -> float:
    """Sampling all of an update's rollouts, capability after capability, on the branch's `servers` servers."""
    return sum(_portion_seconds(portion, speed, servers, seed) for portion in update.portions)


def _portion_seconds(portion: Portion, speed: Speed, servers: int, seed: int) -> float:
    """A server's share of the rollouts, with lengths at even probabilities in a random order; the longest of all
    servers' rollouts is taken to be among them."""
    count = server_share(portion, servers)
    quantiles = portion.lengths.quantiles
    lengths = quantiles[np.linspace(0, len(quantiles) - 1, count).round().astype(int)] if count > 1 else quantiles[-1:]
    order = np.random.default_rng(seed).permutation(count)
    decoded = speed.decode_seconds(lengths[order].tolist(), portion.capability.prompt, portion.group)
    return decoded + prompt_seconds(portion, speed, servers)


def server_share(portion: Portion, servers: int) -> int:
    """Rollouts of one server."""
    return max(1, round(portion.rollouts / servers))


def prompt_seconds(portion: Portion, speed: Speed, servers: int) -> float:
    """Prefill of a server's share of the prompts, each once for its whole group."""
    prompt = portion.capability.prompt
    operations = forward_operations(
        speed.geometry,
        portion.prompts * prompt,
        portion.prompts * prompt**2 / 2,
        portion.patches,
        portion.capability.frame * 4,
    )
    return speed.prefill_seconds(operations / servers)


def scoring_operations(portion: Portion, geometry: Geometry) -> float:
    """A teacher's forward pass over all of a student's rollouts, with logits of the response tokens. The prompt of a
    group is computed once; its other rollouts find it cached."""
    forward = forward_operations(
        geometry, portion.packed_tokens, portion.pairs(), portion.patches, portion.capability.frame * 4
    )
    return forward + 2.0 * geometry.hidden * geometry.vocab * portion.response_tokens


def scoring_seconds(portions: list[Portion], speed: Speed, servers: int) -> float:
    """What an engine computes for its students in one Phase II step."""
    operations = sum(scoring_operations(portion, speed.geometry) for portion in portions)
    return speed.assumed.scoring_overhead * speed.prefill_seconds(operations / servers)


def step_time(
    update: Update,
    scored: list[Portion],
    speed: Speed,
    servers: int,
    training: Training,
    transfers: list[Transfer],
    hand_over: Transfer,
) -> StepTime:
    """Of one update; `scored` are the rollouts that students send to this branch's engine."""
    return StepTime(
        rollout=rollout_seconds(update, speed, servers),
        score=scoring_seconds(scored, speed, servers) if scored else 0.0,
        train=training.seconds,
        communicate=sum(transfer.seconds for transfer in transfers if not transfer.hidden),
        hand_over=hand_over.seconds,
    )
