"""Weights, gradients and optimizer state beside those of a real policy; what fits, what does not, and why."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_policy import base_folder

from copd_megatron.config import RunConfig
from copd_megatron.plan.memory import policy_bytes
from copd_megatron.plan.shards import Stage
from copd_megatron.policy import layout as layouts
from copd_megatron.policy.degrees import Layout
from copd_megatron.policy.optimizer import OptimizerSettings


def described(precision: str, distributed: bool) -> RunConfig:
    return RunConfig.model_validate(
        {
            "base": "base",
            "branches": [{"name": "text", "data": {"mini": {"modality": "text"}}}],
            "topology": "none",
            "precision": {"params": precision},
            "optimizer": {"distributed": distributed},
        }
    )


def held(policy: Any) -> tuple[int, int, int]:
    """Bytes of distinct storages: weights, gradient buffers, optimizer state with its copies of the weights."""

    def size(tensors: Any) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    weights = list(policy.model.parameters())
    gradients = [buffer.grad_data for buffer in policy.model.buffers + policy.model.expert_parallel_buffers]
    state, copies = [], []
    for part in policy.optimizer.chained_optimizers:
        inner = part.optimizer
        state += [v for values in inner.state.values() for v in values.values() if torch.is_tensor(v) and v.dim()]
        copies += [parameter for group in inner.param_groups for parameter in group["params"]]
    own = {parameter.untyped_storage().data_ptr() for parameter in weights}
    extra = [copy for copy in copies if copy.untyped_storage().data_ptr() not in own]
    return size(weights), size(gradients), size(state) + size(extra)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_real_policy_holds_what_is_planned(tmp_path: Path, precision: Any, distributed: bool) -> None:
    from copd_megatron.policy.trainer import Policy

    folder = base_folder(tmp_path / "base")
    layouts.initialize(Layout())
    try:
        settings = OptimizerSettings(distributed=distributed)
        policy = Policy(folder, Layout(), settings, precision, 1024)
        for group in policy.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        for part in policy.optimizer.chained_optimizers:
            part.optimizer.step()
        found = held(policy)
        total = sum(parameter.numel() for parameter in policy.model.parameters())
        del policy
        gc.collect()
    finally:
        layouts.shutdown()
    *planned, host = policy_bytes(Stage(4, total, 0), Layout(), described(precision, distributed))
    assert host == 0
    for name, want, have in zip(("weights", "gradients", "optimizer"), planned, found, strict=True):
        assert want == pytest.approx(have, rel=0.05), name  # buffers of the distributed optimizer are padded


def test_state_is_shared_by_replicas_and_experts_by_theirs() -> None:
    stage = Stage(4, 1000, 8000)
    layout = Layout(world=16, tp=2, ep=4, etp=1, sequence_parallel=True)
    weights, gradients, optimizer, _ = policy_bytes(stage, layout, described("bf16", True))
    assert (weights, gradients) == (2 * 9000, 4 * 9000)
    assert optimizer == 12 * (1000 / 8 + 8000 / 4)
    assert policy_bytes(stage, layout, described("bf16", False))[2] == 12 * 9000


def test_offloaded_state_is_in_host_memory() -> None:
    config = described("bf16", True).model_copy(update={"optimizer": OptimizerSettings(offload=True)})
    *_, optimizer, host = policy_bytes(Stage(4, 1000, 0), Layout(), config)
    assert (optimizer, host) == (0, 12_000)
