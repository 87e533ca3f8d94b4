"""Simulated scaling of a configuration: linear where nothing stands in its way, and what then does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import ConfigError
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.hardware import gpu_of
from copd_megatron.plan.plan import Plan, make_plans, model_folder
from copd_megatron.plan.scale import Point, scaling, sweep

FILE = Path(__file__).parents[2] / "configs" / "qwen3_vl_4b" / "nodes_80gb.yaml"
NOTHING_FAILS = 1e15


@pytest.fixture
def base(in_process: None) -> Any:
    def made(placement: Any = None, **assumed: float) -> tuple[Plan, RunConfig]:
        # Few rollouts: what is drawn is the test's time.
        config = load_config(FILE, ["rl.prompts=64", "rollout.sglang.in_flight=64"], RunConfig)
        folders = [(config, model_folder(config, FILE))]
        (plan,) = make_plans(folders, [gpu_of("h100-80")], Assumptions(**assumed), placement)
        return plan, config

    return made


def growing(points: list[Point]) -> list[Point]:
    return [point for point in points if point.work == "grows"]


def test_without_stragglers_and_failures_work_that_grows_scales_linearly(base: Any) -> None:
    # Engines on GPUs of their own: beside the policy they have more cache, the more replicas share its optimizer.
    plan, config = base("disaggregated", response_spread=0.0, mtbf_gpu_hours=NOTHING_FAILS, host_bandwidth=1e18)
    points = growing(sweep(plan, config, 8, 400, 0, cycles=1))
    assert [point.gpus for point in points] == [12, 24, 48, 96, 192, 384]
    for point in points:
        assert point.per_gpu == pytest.approx(points[0].per_gpu, rel=5e-3), (point, points[0])
        assert point.failures == 0
        assert point.shares["stragglers"] == pytest.approx(0, abs=1e-9)


def test_the_slowest_of_more_servers_is_slower(base: Any) -> None:
    plan, config = base(mtbf_gpu_hours=NOTHING_FAILS)
    points = growing(sweep(plan, config, 24, 800, 0, cycles=2))
    assert points[-1].shares["stragglers"] > 1.2 * points[0].shares["stragglers"] > 0
    assert points[-1].per_gpu < points[0].per_gpu


def test_failures_undo_more_the_more_gpus_there_are(base: Any) -> None:
    plan, config = base(response_spread=0.0, mtbf_gpu_hours=1000.0)
    first, *_, last = growing(sweep(plan, config, 24, 800, 0, cycles=4))
    assert last.failures > first.failures
    assert last.undone > first.undone + 0.1
    assert last.per_gpu < 0.9 * first.per_gpu


def test_fixed_work_ends_where_replicas_would_have_no_prompts(base: Any) -> None:
    plan, config = base(mtbf_gpu_hours=NOTHING_FAILS)
    fixed = [point for point in sweep(plan, config, 8, 2000, 0, cycles=1) if point.work == "fixed"]
    assert {point.prompts for point in fixed} == {64}
    assert fixed[-1].gpus == 24 * 32 // 4  # 64 prompts of two teachers on 32 replicas of every branch
    speeds = [point.tokens_per_second for point in fixed]
    assert speeds == sorted(speeds)
    assert speeds[-1] < 0.5 * speeds[0] * fixed[-1].gpus / fixed[0].gpus


def test_json_and_plot_are_written(base: Any, tmp_path: Path) -> None:
    plan, config = base()
    console = Console(width=150, record=True)
    scaling(plan, config, "24..48", 0, console, tmp_path / "scale.json")
    data = json.loads((tmp_path / "scale.json").read_text())
    assert [point["gpus"] for point in data["points"] if point["work"] == "grows"] == [24, 48]
    assert data["assumptions"]["mtbf_gpu_hours"] == 50_000
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    assert "Simulated, not measured" in console.export_text()


@pytest.mark.parametrize(
    ("wanted", "message"), [("8", "expected FROM..TO"), ("64..8", "expected FROM..TO"), ("1..4", "the smallest has 6")]
)
def test_scales_that_cannot_be_are_named(base: Any, wanted: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaling(*base(), wanted, 0, Console(), None)
