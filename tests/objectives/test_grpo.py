from __future__ import annotations

import math

import pytest
import torch

from copd_megatron.objectives.grpo import clipped_surrogate, group_advantages


def test_advantages_are_standardised_within_the_group():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 3.0, 1.0, 1.0, 1.0])
    advantages, flat = group_advantages(rewards, group_size=4)
    assert flat.tolist() == [False, False]
    spread = math.sqrt(4 * 0.25 / 3)
    assert advantages[:4].tolist() == pytest.approx(
        [-0.5 / spread, 0.5 / spread, 0.5 / spread, -0.5 / spread], rel=1e-4
    )
    assert advantages[4:].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-4)


def test_without_normalisation_only_the_mean_is_taken_off():
    advantages, _ = group_advantages(torch.tensor([0.0, 1.0, 1.0, 0.0, 3.0, 1.0]), 2, normalise_std=False)
    assert advantages.tolist() == [-0.5, 0.5, 0.5, -0.5, 1.0, -1.0]


def test_nearly_equal_rewards_do_not_explode():
    advantages, flat = group_advantages(torch.tensor([1.0, 1.0 + 1e-6]), 2)
    assert flat.tolist() == [False]
    assert advantages.abs().max() < 1


@pytest.mark.parametrize(
    ("rewards", "group_size", "message"),
    [
        ([1.0, 2.0], 1, "group_size is 1"),
        ([1.0, 2.0, 3.0], 2, "a multiple of 2"),
        ([1.0, math.nan], 2, "reward 1 is nan"),
    ],
)
def test_rewards_that_cannot_be_compared_are_refused(rewards, group_size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.tensor(rewards), group_size)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.25, 1.0, -1.25, False),  # below 1 + ε_high
        (1.5, 1.0, -1.28, True),
        (0.5, 1.0, -0.5, False),  # the pessimistic side stays free
        (0.9, -1.0, 0.9, False),
        (0.5, -1.0, 0.8, True),
        (1.5, -1.0, 1.5, False),
        (1.5, 0.0, 0.0, False),
    ],
)
def test_surrogate_clips_the_optimistic_side_only(ratio, advantage, loss, clipped):
    logprobs = torch.tensor([math.log(ratio) - 1], requires_grad=True)
    found, mask = clipped_surrogate(logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), 0.2, 0.28)
    found.sum().backward()
    assert found.item() == pytest.approx(loss)
    assert mask.item() is clipped
    assert logprobs.grad.item() == pytest.approx(0.0 if clipped else -ratio * advantage)


def test_first_update_is_the_plain_policy_gradient():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss, _ = clipped_surrogate(logprobs, logprobs.detach(), torch.tensor([0.5, -1.5]), 0.2, 0.28)
    loss.sum().backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5, 1.5])


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_enormous_ratios_stay_finite(advantage):
    logprobs = torch.tensor([0.0], requires_grad=True)
    loss, _ = clipped_surrogate(logprobs, torch.tensor([-1e4]), torch.tensor([advantage]), 0.2, 0.28)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(logprobs.grad).all()


def test_advantages_and_old_logprobs_are_constants():
    advantages = torch.tensor([1.0], requires_grad=True)
    old = torch.tensor([-1.0], requires_grad=True)
    loss, _ = clipped_surrogate(torch.tensor([-1.0], requires_grad=True), old, advantages, 0.2, 0.28)
    loss.sum().backward()
    assert advantages.grad is None
    assert old.grad is None
