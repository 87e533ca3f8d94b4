"""The learning rate, and what settings are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from copd_megatron.policy.optimizer import OptimizerSettings, learning_rate


def test_rate_is_constant_by_default() -> None:
    settings = OptimizerSettings(lr=3e-4)
    assert {learning_rate(settings, step) for step in (0, 1, 1000)} == {3e-4}


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    settings = OptimizerSettings(lr=1.0, warmup_steps=4)
    assert [learning_rate(settings, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_decay_falls_linearly_to_its_floor_and_stays() -> None:
    settings = OptimizerSettings(lr=2.0, decay_steps=4, min_lr_ratio=0.5)
    rates = [learning_rate(settings, step) for step in (0, 1, 2, 3, 4, 9)]
    assert rates == pytest.approx([2.0, 1.75, 1.5, 1.25, 1.0, 1.0])


def test_warm_up_and_decay_multiply() -> None:
    settings = OptimizerSettings(lr=1e-3, warmup_steps=50, decay_steps=300, min_lr_ratio=0.1)
    for step in (0, 10, 49, 50, 200):
        expected = 1e-3 * min(1, (step + 1) / 50) * (0.1 + 0.9 * (1 - step / 300))
        assert learning_rate(settings, step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0),
        ("betas", (0.9, 1.0)),
        ("min_lr_ratio", 2),
        ("max_skipped", 0),
        ("decay_steps", 0),
        ("learning_rate", 1),
    ],
)
def test_impossible_settings_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        OptimizerSettings(**{key: value})


def test_settings_cannot_be_changed_later() -> None:
    settings = OptimizerSettings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.lr = 1.0  # type: ignore[misc]
