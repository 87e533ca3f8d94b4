"""Group-relative policy optimisation: advantages within a group of rollouts, and the clipped surrogate."""

from __future__ import annotations

import torch

MAX_LOG_RATIO = 20.0
"""exp(20) is finite in every format; a ratio that large is clipped or masked in any case."""


def group_advantages(
    rewards: torch.Tensor, group_size: int, normalise_std: bool = True, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantage (r − mean) / (std + eps) within each group (docs/method.md, "Algorithm").

    `rewards` [B], the `group_size` rollouts of a prompt next to each other. Returns advantages float32 [B] and a mask
    bool [B / G] of the groups whose rewards are all equal: their advantages are exactly 0, they teach nothing, and
    they are to be counted (pitfall 13). The standard deviation is that of a sample (G − 1). Without `normalise_std`
    the advantage is r − mean. Raises ValueError for groups of one, an incomplete group or rewards that are not finite.
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: a rollout can only be better than others of its group; use ≥ 2")
    if rewards.ndim != 1 or rewards.numel() % group_size:
        raise ValueError(
            f"rewards have shape {tuple(rewards.shape)}: expected one axis, a multiple of {group_size} long"
        )
    if not torch.isfinite(rewards).all():
        place = int((~torch.isfinite(rewards)).nonzero()[0])
        raise ValueError(f"reward {place} is {float(rewards[place])}: verifiers must return finite numbers")
    groups = rewards.float().view(-1, group_size)
    flat = groups.amax(dim=1) == groups.amin(dim=1)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if normalise_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    return advantages.masked_fill(flat[:, None], 0.0).flatten(), flat


def clipped_surrogate(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss −min(ρÂ, clip(ρ, 1 − ε_low, 1 + ε_high)Â), ρ = exp(log π − log π_old); all arguments [R].

    Returns the loss [R] and a mask bool [R] of the tokens that clipping has left without gradient.
    """
    ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = advantages.detach()
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -torch.minimum(free, bounded), (bounded < free).detach()
