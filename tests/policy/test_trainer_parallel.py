"""The same update on several processes, however they divide model and samples."""

from __future__ import annotations

import json
from pathlib import Path

import gang
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import (
    base_folder,
    gradients,
    make_samples,
    new_policy,
    toy_loss,
    weights_of,
    worst_difference,
)

from copd_megatron.policy import layout as layouts
from copd_megatron.policy.layout import Layout

LAYOUTS = {
    "alone": Layout(),
    "data": Layout(world=2),
    "tensor": Layout(world=2, tp=2),
    "pipeline": Layout(world=2, pp=2),
}


def make_updates(base: Path, out: Path, name: str, distributed: bool) -> None:
    """Three unclipped updates; the first one's gradient is kept. Files are written by the first rank."""
    layout = LAYOUTS[name]
    layouts.initialize(layout)
    rank = torch.distributed.get_rank()
    metrics = []
    policy = new_policy(base, layout, max_tokens=40, clip_grad=0, eps=1e-3, distributed=distributed)
    for step in range(3):
        samples = make_samples(base, prompts=6, group=2, seed=step, teachers=True)
        replica = layouts.data_parallel_rank()
        mine = samples if layout.dp == 1 else (samples[:2], samples[2:])[replica]  # of unequal size
        if step == 2 and replica == 1:
            mine = []
        logprobs = policy.logprobs(mine)
        assert [len(part) for part in logprobs] == [len(sample.rollout.token_ids) for sample in mine]
        metrics.append(policy.update(mine, toy_loss))
        if step == 0 and not distributed:
            gradient = gradients(policy)
            if rank == 0:
                save_file(gradient, out / f"{name}.gradients")
    weights = weights_of(policy)
    if rank == 0:
        save_file(weights, out / f"{name}{distributed}.weights")
        (out / f"{name}{distributed}.json").write_text(json.dumps(metrics))
    layouts.shutdown()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("policy") / "base")


@pytest.fixture(scope="module")
def alone(base: Path) -> Path:
    """What a single process gives."""
    out = base.parent
    make_updates(base, out, "alone", False)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensor", "pipeline"])
def test_divided_model_is_updated_like_a_whole_one(base: Path, alone: Path, tmp_path: Path, name: str) -> None:
    gang.run(2, make_updates, base, tmp_path, name, False)
    assert worst_difference(load_file(tmp_path / f"{name}.gradients"), load_file(alone / "alone.gradients")) < 1e-4
    weights = load_file(tmp_path / f"{name}False.weights")
    assert worst_difference(weights, load_file(alone / "aloneFalse.weights")) < 1e-3
    same_metrics(tmp_path / f"{name}False.json", alone / "aloneFalse.json", steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("distributed", [False, True])
def test_replicas_add_their_samples_up(base: Path, alone: Path, tmp_path: Path, distributed: bool) -> None:
    gang.run(2, make_updates, base, tmp_path, "data", distributed)
    if not distributed:
        assert worst_difference(load_file(tmp_path / "data.gradients"), load_file(alone / "alone.gradients")) < 1e-4
    same_metrics(tmp_path / f"data{distributed}.json", alone / "aloneFalse.json", steps=2)
    last = json.loads((tmp_path / f"data{distributed}.json").read_text())[2]
    assert 0 < last["response_tokens"] < 20, "one replica had no samples, and the other did not wait for it"


def same_metrics(found: Path, expected: Path, steps: int) -> None:
    pairs = zip(json.loads(found.read_text())[:steps], json.loads(expected.read_text())[:steps], strict=True)
    for ours, theirs in pairs:
        for name in ("loss", "grad_norm", "entropy", "cross", "lr", "skipped", "response_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name
