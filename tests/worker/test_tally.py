"""Sums over rollouts and replicas."""

import pytest
import torch

from copd_megatron.rollout.types import Prompt, Rollout
from copd_megatron.worker.tally import Tally


def rollout(reward, length, finish="stop"):
    prompt = Prompt("p", "text", (1,), "", "exact", "")
    return Rollout(prompt, tuple(range(length)), torch.zeros(length), finish, 0, "", reward=reward)


def test_means_are_over_all_replicas_not_means_of_means():
    first = Tally.of([rollout(1.0, 2), rollout(0.0, 4, "length")], {}, groups=1, zero_variance=0)
    second = Tally.of([rollout(1.0, 6)], {"image": [rollout(None, 8)]}, groups=1, zero_variance=1)
    values = Tally.total([first, second, Tally()]).metrics()
    assert values["reward/mean"] == pytest.approx(2 / 3)
    assert values["reward/std"] == pytest.approx((2 / 9) ** 0.5)
    assert values["rollout/length"] == pytest.approx(20 / 4)
    assert values["rollout/truncated"] == pytest.approx(1 / 4)
    assert (values["count/rollouts"], values["count/rollout_tokens"]) == (4, 20)
    assert (values["count/groups"], values["count/zero_variance"], values["count/truncated"]) == (2, 1, 1)


def test_a_branch_without_own_rollouts_has_no_reward():
    assert "reward/mean" not in Tally.of([], {"image": [rollout(None, 3)]}).metrics()
