"""`copd plan` on the shipped configurations: what fits, what does not, and what is said then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plan_tables import SHIPPED
from typer.testing import CliRunner

from copd_megatron.cli import app
from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import ConfigError
from copd_megatron.plan.assumptions import Assumptions, assumptions_of
from copd_megatron.plan.command import DoesNotFit
from copd_megatron.plan.hardware import GPUS, gpu_of
from copd_megatron.plan.plan import Plan, make_plans, model_folder
from copd_megatron.plan.verdict import verdict

ROOT = Path(__file__).parents[2]
SMALL = ROOT / "configs" / "qwen3_vl_4b" / "nodes_80gb.yaml"
FAMILIES = {"qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b", "qwen3_vl_30b_a3b", "qwen3_vl_235b_a22b"}
PARAMETERS = {
    "qwen3_vl_4b": 4_437_815_808,
    "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_32b": 33_357_390_064,
    "qwen3_vl_30b_a3b": 31_070_754_032,
    "qwen3_vl_235b_a22b": 235_670_022_896,
}
"""What transformers' own models have with the same configurations."""


def planned(file: Path, *overrides: str, gpu: str = "h100-80", **options: Any) -> tuple[Plan, RunConfig]:
    config = load_config(file, overrides, RunConfig)
    (plan,) = make_plans([(config, model_folder(config, file))], [gpu_of(gpu)], Assumptions(), **options)
    return plan, config


def test_each_family_has_a_configuration_for_both_kinds_of_node() -> None:
    assert {file.parent.name for file, _ in SHIPPED} == FAMILIES
    assert [gpu for _, gpu in SHIPPED].count("h100-80") == [gpu for _, gpu in SHIPPED].count("h200-141") == 5
    assert {file for file, _ in SHIPPED} == set((ROOT / "configs").glob("qwen3_vl_*/nodes_*.yaml"))


@pytest.mark.parametrize(("file", "gpu"), SHIPPED, ids=lambda value: getattr(value, "stem", value))
def test_shipped_configurations_have_the_papers_settings(file: Path, gpu: str) -> None:
    config = load_config(file, [], RunConfig)
    assert (config.rl.prompts, config.rl.group, config.rl.clip_low, config.rl.clip_high) == (256, 8, 0.2, 0.28)
    assert (config.data.max_prompt_tokens, config.rollout.max_new_tokens) == (16_384, 16_384)
    assert (config.optimizer.lr, config.rollout.temperature, config.opd.loss) == (1e-6, 1.0, "sampled")
    assert (config.rhythm.explore_steps, config.rhythm.exchange_steps) == (15, 10)
    assert [branch.name for branch in config.branches] == ["text", "image", "video"]
    assert len(config.edges) == 4
    assert config.cross_prompts == config.native_prompts == 256


FIRST = [(file, gpu) for file, gpu in SHIPPED if file.parent.name in ("qwen3_vl_4b", "qwen3_vl_8b")]
OTHERS = [pair for pair in SHIPPED if pair not in FIRST]


@pytest.mark.parametrize(("file", "gpu"), FIRST, ids=lambda value: getattr(value, "stem", value))
def test_small_configurations_fit(in_process: None, file: Path, gpu: str) -> None:
    plan, config = planned(file, gpu=gpu)
    assert verdict(plan, config).problems == ()
    assert plan.shards.total == PARAMETERS[file.parent.name]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "gpu"), OTHERS, ids=lambda value: getattr(value, "stem", value))
def test_large_configurations_fit(in_process: None, file: Path, gpu: str) -> None:
    plan, config = planned(file, gpu=gpu)
    assert verdict(plan, config).problems == ()
    assert plan.shards.total == PARAMETERS[file.parent.name]


def test_what_does_not_fit_is_named_with_what_to_change(in_process: None) -> None:
    plan, config = planned(SMALL, "precision.recompute=none")
    (problem, *_) = verdict(plan, config).problems
    assert problem.startswith("branch text: a rank of stage 0 needs ")
    assert "while training, h100-80 has 80.0: set precision.recompute: full" in problem
    plan, config = planned(SMALL, "optimizer.distributed=false", "optimizer.overlap_grad_reduce=false")
    rank = plan.branches[0].ranks[0]
    assert rank.optimizer == 12 * plan.shards.stages[0].parameters


def test_an_engine_without_room_for_one_sequence_is_a_problem(in_process: None) -> None:
    plan, config = planned(SMALL, "rollout.sglang.args.mem-fraction-static=0.15")
    assert "one sequence can have 32,768: raise rollout.sglang.tensor_parallel" in verdict(plan, config).problems[0]


def test_too_few_nodes_are_a_problem(in_process: None) -> None:
    plan, config = planned(SMALL, nodes=2)
    (problem,) = verdict(plan, config).problems
    assert "takes 24 GPUs, 3 nodes, and --nodes gives it 2" in problem
    plan, config = planned(SMALL, nodes=3)
    assert verdict(plan, config).fits


def test_engines_elsewhere_leave_the_policys_gpus_alone(in_process: None) -> None:
    together, _ = planned(SMALL)
    apart, _ = planned(SMALL, placement="disaggregated", engine_gpus=4)
    assert together.gpus == 24
    assert apart.gpus == 24 + 3 * 4
    assert apart.branches[0].ranks[0].engine == apart.branches[0].ranks[0].cache == 0
    assert apart.branches[0].slots > together.branches[0].slots


def test_a_hub_makes_as_many_rollouts_as_its_spokes(in_process: None) -> None:
    plan, _ = planned(SMALL)
    text = plan.branches[0]
    for branch in plan.branches:
        assert branch.phases["exchange"].update.rollouts == 2 * 2048  # its own, and those for its teachers
    assert [portion.rollouts for portion in text.phases["exchange"].update.cross.values()] == [1024, 1024]
    assert sorted(branch.phases["exchange"].time.wait for branch in plan.branches)[0] == 0
    # docs/sglang.md: 759 bytes per scored token with top 64.
    scored = sum(portion.response_tokens for portion in text.phases["exchange"].update.cross.values())
    assert text.score_answer_bytes / scored == pytest.approx(759.4, abs=0.1)


def test_the_command_prints_the_plan_and_fails_with_the_reason(in_process: None, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    result = CliRunner().invoke(app, ["plan", str(SMALL), "--json", str(out), "--assume", "response_tokens=2048"])
    assert result.exit_code == 0, result.output
    assert "Fits." in result.output
    assert "response_tokens" in result.output
    data = json.loads(out.read_text())
    assert data["verdict"]["fits"] is True
    assert data["assumed"]["response_tokens"] == 2048
    assert data["branches"][0]["ranks"][0]["peak"] < GPUS["h100-80"].memory
    result = CliRunner().invoke(app, ["plan", str(SMALL), "precision.recompute=none"])
    assert isinstance(result.exception, DoesNotFit)
    assert result.exception.exit_code == 1
    assert "set precision.recompute: full" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "a100"], "--gpu a100: not known; expected one of h100-80"),
        (["--placement", "beside"], "--placement beside: expected colocated or disaggregated"),
        (["--assume", "response_tokens"], "expected NAME=VALUE"),
        (["--assume", "response_token=9"], "response_token: unknown key; did you mean 'response_tokens'"),
        (["--assume", "knee_share=2"], "knee_share: .*less than or equal to 1"),
        (["--json", "plan.txt"], r"expected the name of a \.json file"),
    ],
)
def test_bad_options_are_named(in_process: None, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(SMALL), *arguments])
    assert isinstance(result.exception, ConfigError)
    with pytest.raises(ConfigError, match=message):
        raise result.exception


def test_a_base_that_nobody_describes_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(SMALL.read_text())
    with pytest.raises(ConfigError, match=r"no config\.json in models/Qwen3-VL-4B-Instruct or .*model; planning needs"):
        model_folder(load_config(file, [], RunConfig), file)


def test_every_assumption_is_documented_and_can_be_set() -> None:
    for name, field in Assumptions.model_fields.items():
        assert field.description, name
        assert getattr(assumptions_of([f"{name}={field.default}"]), name) == field.default
