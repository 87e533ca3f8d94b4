"""The two traps that the plot shows are there in its numbers."""

from __future__ import annotations

import kernel_traps
import pytest

SEEDS = (0, 1, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_as_a_loss_top_k_kl_brings_the_student_to_the_teacher(seed):
    curves = kernel_traps.descend("loss", seed)
    assert curves["value"][-1] < 0.01 * curves["value"][0]
    assert curves["kl"][-1] < 0.5 * curves["kl"][0]


@pytest.mark.parametrize("seed", SEEDS)
def test_as_an_advantage_it_does_not(seed):
    curves = kernel_traps.descend("advantage", seed)
    assert curves["value"][-1] > 0.5 * curves["value"][0]


@pytest.mark.parametrize("seed", SEEDS)
def test_without_its_tail_it_pays_for_draining_the_top_k(seed):
    curves = kernel_traps.descend("truncated", seed)
    assert curves["value"][-1] < 0 < curves["value"][0]
    assert curves["mass"][-1] < 0.6 * curves["mass"][0]
    assert curves["kl"][-1] > 1.5 * curves["kl"][0]


def test_the_figure_is_a_png():
    assert kernel_traps.draw().startswith(b"\x89PNG")
