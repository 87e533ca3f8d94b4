"""95% intervals for accuracies: of one capability, and of the unweighted mean over several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

Z = NormalDist().inv_cdf(0.975)
"""Half-width of a 95% interval in standard deviations of a normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """An accuracy in [0, 1] with its 95% interval.

    `trials` is the number of independent yes/no trials that tell as much as the samples did.
    """

    accuracy: float
    low: float
    high: float
    trials: float


def wilson(accuracy: float, trials: float) -> Estimate:
    """Wilson's score interval, which holds its level near 0 and 1 and for few trials (Wilson 1927).

    `trials` need not be whole. Raises ValueError unless it is above 0 and `accuracy` is in [0, 1].
    """
    if not 0 <= accuracy <= 1 or not trials > 0:
        raise ValueError(f"accuracy is {accuracy} and trials {trials}, expected a share and a number above 0")
    square = Z * Z / trials
    centre = (accuracy + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(accuracy * (1 - accuracy) / trials + square / (4 * trials))
    # At 0 and 1 a bound equals the accuracy; rounding must not put it on the other side.
    return Estimate(accuracy, min(accuracy, max(0.0, centre - half)), max(accuracy, min(1.0, centre + half)), trials)


def accuracy_of(rewards: Sequence[Sequence[float]]) -> Estimate:
    """Mean of all rewards with Wilson's interval for as many trials as the samples are worth.

    `rewards[i]` are the rewards in [0, 1] of the n_i samples of problem i. Samples of one problem resemble each
    other, so the N samples of P problems are worth fewer than N trials: as many as give the variance found between
    problems, m(1 − m) / v with v = P / (P − 1) · Σ(n_i (m_i − m))² / N², but at least N² / Σn_i² (samples of a problem
    all alike; P if the n_i are equal) and at most N (Kish 1965; Korn & Graubard 1998).
    """
    problems = len(rewards)
    if not problems or not all(rewards):
        raise ValueError(f"rewards of {problems} problems, expected at least one problem and one sample of each")
    if not all(0 <= reward <= 1 for samples in rewards for reward in samples):
        raise ValueError("rewards must be in [0, 1] to be read as an accuracy")
    sizes = [len(samples) for samples in rewards]
    most = sum(sizes)
    least = most**2 / sum(size**2 for size in sizes)
    mean = min(1.0, math.fsum(reward for samples in rewards for reward in samples) / most)
    if mean in (0, 1) or problems == 1:
        return wilson(mean, least)
    between = math.fsum((math.fsum(samples) - len(samples) * mean) ** 2 for samples in rewards)
    trials = mean * (1 - mean) * (problems - 1) / problems * most**2 / between if between else most
    return wilson(mean, min(most, max(least, trials)))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean of independent accuracies, with the normal approximation.

    mean ± z · √(Σ_k v_k) / K, with v_k = p̃_k (1 − p̃_k) / (n_k + z²) and p̃_k = (n_k p_k + z²/2) / (n_k + z²): the
    variance of capability k with two successes and two failures added (Agresti & Coull 1998), so that a capability at
    0 or 100% does not count as certain. Clipped to [0, 1].
    """
    if not estimates:
        raise ValueError("no accuracies to take the mean of")
    mean = fmean(estimate.accuracy for estimate in estimates)
    variance = 0.0
    for estimate in estimates:
        trials = estimate.trials + Z * Z
        share = (estimate.trials * estimate.accuracy + Z * Z / 2) / trials
        variance += share * (1 - share) / trials
    half = Z * math.sqrt(variance) / len(estimates)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half), sum(estimate.trials for estimate in estimates))
