"""The simulated run on cases whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from copd_megatron.plan.events import Activities, Draw, NeverEnds, Rules, simulate


def rules(**changes: object) -> Rules:
    settings: dict[str, object] = {
        "gpus": {"text": 8, "image": 8},
        "peers": {"text": ("image",), "image": ("text",)},
        "cycles": 3,
        "explore_steps": 4,
        "exchange_steps": 2,
        "checkpoint_every": None,
        "stall": 0.0,
        "write": 0.0,
        "mtbf": math.inf,
        "restart": 0.0,
    }
    return Rules(**{**settings, **changes})  # type: ignore[arg-type]


def always(seconds: Mapping[str, tuple[float, float]]) -> Draw:
    """Updates of fixed length: (Phase I, Phase II) per branch."""

    def draw(name: str, exchange: bool, random: np.random.Generator) -> Activities:
        return {"train": seconds[name][exchange]}

    return draw


def test_without_failures_and_stragglers_time_does_not_depend_on_gpus() -> None:
    same = always({"text": (10.0, 30.0), "image": (10.0, 30.0)})
    small, large = (simulate(rules(gpus={"text": n, "image": n}), same, 0) for n in (8, 8192))
    assert small.seconds == large.seconds == 3 * (4 * 10 + 2 * 30)
    assert small.waits == large.waits == 0
    assert large.gpu_seconds == 1024 * small.gpu_seconds


def test_the_slower_branch_is_waited_for_in_each_phase() -> None:
    outcome = simulate(rules(), always({"text": (10.0, 30.0), "image": (20.0, 25.0)}), 0)
    # image ends Phase II 5 s before text and begins the next Phase I then.
    assert outcome.seconds == 3 * (4 * 20 + 2 * 30) - 2 * 5
    assert outcome.waits == 8 * (2 * outcome.seconds - 3 * (4 * 10 + 2 * 30) - 3 * (4 * 20 + 2 * 25))
    assert sum(outcome.shares.values()) == pytest.approx(1.0)


def test_one_branch_alone_waits_for_nobody() -> None:
    outcome = simulate(rules(gpus={"text": 4}, peers={}), always({"text": (7.0, 11.0)}), 0)
    assert outcome.seconds == 3 * (4 * 7 + 2 * 11)
    assert outcome.waits == 0


def test_checkpoints_cost_their_stall_at_the_end_of_each_phase_and_every_so_many_updates() -> None:
    outcome = simulate(rules(gpus={"text": 1}, peers={}, stall=2.0), always({"text": (1.0, 1.0)}), 0)
    assert outcome.stalls == 2.0 * 2 * 3
    often = simulate(rules(gpus={"text": 1}, peers={}, stall=2.0, checkpoint_every=1), always({"text": (1.0, 1.0)}), 0)
    assert often.stalls == 2.0 * 6 * 3
    assert often.seconds == 18 + often.stalls


def test_lost_work_is_what_exponential_failures_cost() -> None:
    """Daly: segments of length τ with a checkpoint of C take (M + R)(e^((τ + C) / M) − 1) each on average, where a
    failure costs the restart R and what the segment has done (failures while restarting left out: R is small)."""
    step, stall, restart, mtbf, steps = 100.0, 20.0, 5.0, 2000.0, 12_000
    run = rules(
        gpus={"text": 1},
        peers={},
        cycles=1,
        explore_steps=steps,
        exchange_steps=0,
        checkpoint_every=4,
        stall=stall,
        mtbf=mtbf,
        restart=restart,
    )
    outcome = simulate(run, always({"text": (step, step)}), 1)
    segment = 4 * step + stall
    expected = steps / 4 * (mtbf + restart) * (math.exp(segment / mtbf) - 1)
    assert outcome.seconds == pytest.approx(expected, rel=0.02)
    assert outcome.failures == pytest.approx(outcome.seconds / mtbf, rel=0.1)
    assert outcome.lost == pytest.approx(outcome.seconds - steps * step - outcome.stalls - outcome.restarts, rel=1e-6)


def test_failures_come_in_proportion_to_gpus() -> None:
    same = always({"text": (9, 9), "image": (9, 9)})
    counts = [simulate(rules(cycles=1000, gpus={"text": n, "image": n}, mtbf=2e3), same, 3) for n in (2, 8)]
    rates = [outcome.failures / outcome.seconds for outcome in counts]
    assert rates[1] / rates[0] == pytest.approx(4, rel=0.25)


def test_a_failure_takes_every_branch_back_to_the_last_common_checkpoint() -> None:
    """Two branches side by side lose twice the GPU time of one with as many failures; one that is ahead loses more."""
    settings: dict[str, object] = {"cycles": 2000, "explore_steps": 5, "exchange_steps": 1, "mtbf": 400.0}
    one = simulate(rules(gpus={"text": 2}, peers={}, **settings), always({"text": (1.0, 1.0)}), 0)
    gpus = {"text": 1, "image": 1}
    two = simulate(rules(gpus=gpus, **settings), always({"text": (1.0, 1.0), "image": (1.0, 1.0)}), 0)
    assert (two.lost, two.failures, two.seconds) == pytest.approx((one.lost, one.failures, one.seconds))
    assert one.failures > 50
    ahead = simulate(rules(gpus=gpus, **settings), always({"text": (1.0, 1.0), "image": (0.5, 1.0)}), 0)
    assert ahead.seconds == pytest.approx(two.seconds, rel=0.05)
    assert ahead.waits > 0.2 * ahead.spent["train"]


def test_a_checkpoint_counts_only_when_it_is_written() -> None:
    early, late = (
        simulate(
            rules(gpus={"text": 1}, peers={}, cycles=300, checkpoint_every=1, write=write, mtbf=60.0),
            always({"text": (1.0, 1.0)}),
            5,
        )
        for write in (0.0, 5.0)
    )
    assert late.lost / late.failures == pytest.approx(early.lost / early.failures + 5, rel=0.25)


def test_a_run_that_fails_before_every_checkpoint_is_given_up() -> None:
    with pytest.raises(NeverEnds, match=r"one every 1 s on average; lower checkpoint\.every_steps"):
        simulate(rules(mtbf=16.0), always({"text": (9.0, 9.0), "image": (9.0, 9.0)}), 0)


def test_the_same_seed_gives_the_same_run() -> None:
    run = rules(mtbf=2e3, restart=10.0, write=3.0)
    same = always({"text": (10.0, 30.0), "image": (20.0, 25.0)})
    assert simulate(run, same, 4) == simulate(run, same, 4)
    assert simulate(run, same, 4).seconds != simulate(run, same, 5).seconds
