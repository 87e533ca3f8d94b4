"""Lengths, decoding, packing, pipelines and knees on cases whose answer is known."""

from __future__ import annotations

import pytest

from copd_megatron.plan.compute import bubble_share
from copd_megatron.plan.engines import decode
from copd_megatron.plan.lengths import Lengths
from copd_megatron.plan.memory import in_flight
from copd_megatron.plan.packing import full
from copd_megatron.plan.scale import Point, knee
from copd_megatron.policy.degrees import Layout


def test_lengths_have_the_mean_they_are_given_and_end_at_the_longest() -> None:
    assert Lengths(1000.0, 0.5, 10**9).average == pytest.approx(1000, rel=0.01)
    assert Lengths(1000.0, 0.5, 10**9).cut_share == 0
    alike = Lengths(1000.0, 0.0, 2000)
    assert alike.average == pytest.approx(1000)
    assert alike.mean_square == pytest.approx(1000**2)
    cut = Lengths(1000.0, 1.0, 1000)
    assert cut.average < 1000
    assert cut.quantiles.max() == 1000
    assert cut.cut_share == pytest.approx(0.31, abs=0.02)


def test_decoding_goes_on_until_the_longest_is_done() -> None:
    assert decode([5, 9, 2], 8, lambda count: 1.0) == 9
    # Three decode 2 tokens, two decode 3 more, one decodes 4 more.
    assert decode([5, 9, 2], 8, lambda count: float(count)) == 3 * 2 + 2 * 3 + 1 * 4


def test_a_waiting_sequence_takes_the_first_place_that_is_free() -> None:
    assert decode([5, 9, 2], 1, lambda count: 1.0) == 16
    assert decode([5, 9, 2], 2, lambda count: 1.0) == 9  # the third runs from 5 to 7
    assert decode([4] * 10, 5, lambda count: 1.0) == 8


def test_micro_batches_are_filled_to_the_last_token() -> None:
    packing = full(1000, 100, 120, 4, visual=60, frame=32)
    assert packing.tokens == 1000
    assert packing.prompts == (100, 100)
    assert packing.responses[:4] == (120, 120, 120, 120)
    assert packing.frames == (128, 112, 128, 112)
    calls = packing.calls(cp=1)
    assert [call.rows for call in calls] == [2, len(packing.responses)]
    assert calls[1].mask == len(packing.responses) * 119 * 219
    assert calls[0].mask == 0
    assert packing.calls(cp=2)[0].mask == 2 * 50 * 100


def test_bubble_and_activations_of_pipelines() -> None:
    assert bubble_share(4, 1, 12) == pytest.approx(3 / 15)
    assert bubble_share(4, 3, 12) == pytest.approx(3 / 39)
    assert bubble_share(1, 1, 1) == 0
    four = Layout(world=4, pp=4)
    assert [in_flight(four, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(four, 0, 2) == 2
    assert in_flight(Layout(), 0, 5) == 1
    assert in_flight(Layout(world=2, pp=2, vpp=2), 0, 8) == (2 + 2 + 1) / 2


def point(gpus: int, tokens: float, **shares: float) -> Point:
    return Point(gpus, "grows", 1, tokens, {"checkpoint": 0.0, "lost": 0.0, "restart": 0.0, **shares}, 0, 1.0)


def test_the_knee_is_the_last_scale_that_is_worth_its_gpus() -> None:
    points = [
        point(8, 80.0, rollout=0.9, wait=0.1),
        point(16, 158.0, rollout=0.88, wait=0.12),
        point(32, 290.0, rollout=0.8, wait=0.2),
        point(64, 300.0, rollout=0.5, wait=0.5),
    ]
    found = knee(points, 0.8)
    assert found.gpus == 32
    assert "wait: 10% of the GPUs' time at 8 GPUs, 50% at 64" in found.because
    assert knee(points[:3], 0.8).gpus is None
    assert knee([], 0.8).gpus is None
