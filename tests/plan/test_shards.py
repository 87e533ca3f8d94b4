"""Ranks are counted in the real model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen3_vl as tiny

from copd_megatron.errors import ConfigError
from copd_megatron.plan.shards import ShardRequest, Shards, count, count_one, smallest
from copd_megatron.policy.degrees import Layout
from copd_megatron.policy.qwen3_vl import build_model


def folder(path: Path, hf: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(hf.to_dict(), default=str))
    return str(path)


def counted(base: str, **degrees: Any) -> Shards:
    answer = count_one(asdict(ShardRequest(base, Layout(**degrees), "fp32")))
    return Shards.of(json.loads(json.dumps(answer)))


@pytest.mark.parametrize("tied", [True, False])
def test_every_division_adds_up_to_the_whole_model(tmp_path: Path, tied: bool) -> None:
    hf = tiny.config(tied=tied, vocab=54)
    base = folder(tmp_path / "dense", hf)
    with tiny.alone() as layout:
        whole = sum(parameter.numel() for parameter in build_model(hf, layout, "fp32")[0].parameters())
    for degrees in ({}, {"world": 2, "tp": 2}, {"world": 2, "pp": 2}, {"world": 8, "tp": 2, "pp": 2}):
        found = counted(base, **degrees)
        assert found.total == found.active == whole
        assert len(found.stages) == degrees.get("pp", 1)
    two = counted(base, world=2, tp=2).stages[0].dense
    assert whole / 2 < two < whole  # norms are whole on every rank


def test_experts_are_counted_apart(tmp_path: Path) -> None:
    hf = tiny.moe_config()
    base = folder(tmp_path / "experts", hf)
    alone = counted(base)
    divided = counted(base, world=4, tp=2, ep=4, etp=1, sequence_parallel=True)
    assert divided.total == alone.total + 2 * 128  # 53 tokens are 54 for two ranks, in and out
    assert divided.stages[0].expert == alone.stages[0].expert / 4
    assert alone.active == alone.total - alone.stages[0].expert / 2  # two of four experts
    assert alone.geometry.sparse_layers == alone.geometry.layers == 4


def test_replicas_add_no_parameters() -> None:
    assert smallest(Layout(world=64, tp=2, pp=2)).world == 4
    assert smallest(Layout(world=64, tp=2, ep=8, etp=1, sequence_parallel=True)).world == 8


@pytest.mark.slow
def test_a_child_process_says_what_does_not_fit() -> None:
    base = str(Path(__file__).parents[2] / "configs" / "qwen3_vl_4b" / "model")
    with pytest.raises(ConfigError, match=r"parallel\.tp = 3 does not divide .*num_attention_heads = 32"):
        count([ShardRequest(base, Layout(world=3, tp=3), "bf16")])
