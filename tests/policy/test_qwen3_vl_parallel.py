"""The same weights and batches on two processes as on one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from tiny_qwen3_vl import Video, alone, config, conversation, pack, reference

from copd_megatron.objectives.vocabulary import token_logprobs
from copd_megatron.policy import layout as process_layout
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.packed import MicroBatch
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.weights.mapping import to_hf, to_megatron

Result = dict[str, dict[str, torch.Tensor]]

BATCHES = [
    [conversation(2, 5, [4, 6], [(1, 4, 8)]), conversation(1, 9, [5, 3])],
    [conversation(6, 7, [6, 1], [(1, 4, 8), Video(3, 2, 2)])],
    [conversation(7, 12, [1, 8, 2, 5])],
]


def forward_and_backward(layout: Layout, tied: bool, checkpoint: str | None = None) -> Result:
    """Hugging Face named weights and gradients on the leader, log-probabilities of responses on the last stage."""
    from megatron.core import dist_checkpointing
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    hf = reference(config(tied, (0, 1)))
    model = build_model(hf.config, layout, "fp32")
    to_megatron(hf.state_dict(), model)
    wrapped = DistributedDataParallel(model[0].config, DistributedDataParallelConfig(), model[0])
    wrapped.zero_grad_buffer()
    model[0].config.finalize_model_grads_func = finalize_model_grads
    logprobs: dict[str, torch.Tensor] = {}

    def step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch = next(batches)

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            found = token_logprobs(output, batch.targets, 1.0, model[0].vocabulary)
            logprobs[str(len(logprobs))] = found.detach()
            return (torch.linspace(-1.0, 2.0, len(found)) * found).sum(), {}

        return chunk(batch), loss

    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter([pack(batch) for batch in BATCHES]),
        model=wrapped,
        num_microbatches=len(BATCHES),
        seq_length=1,
        micro_batch_size=1,
        forward_only=False,
    )
    weights = {name: tensor.clone() for name, tensor in to_hf([wrapped])}
    if checkpoint is not None:
        dist_checkpointing.save(model[0].sharded_state_dict(), checkpoint)
    for parameter in model[0].parameters():
        parameter.data = parameter.main_grad
    return {"logprobs": logprobs, "weights": weights, "gradients": dict(to_hf(model))}


def in_gang(layout: Layout, checkpoints: dict[bool, str]) -> dict[bool, Result]:
    process_layout.initialize(layout)
    results = {tied: forward_and_backward(layout, tied, folder) for tied, folder in checkpoints.items()}
    assert all(bool(result["weights"]) == process_layout.is_replica_leader() for result in results.values())
    assert all(bool(result["logprobs"]) == process_layout.is_last_stage() for result in results.values())
    assert process_layout.broadcast_in_replica("mine" if process_layout.is_replica_leader() else None) == "mine"
    process_layout.shutdown()
    return results


@pytest.fixture(scope="module")
def single() -> dict[bool, Result]:
    with alone() as layout:
        return {tied: forward_and_backward(layout, tied) for tied in (True, False)}


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"pp": 2}], ids=["tp2", "pp2"])
def test_two_processes_compute_what_one_does(
    single: dict[bool, Result], degrees: dict[str, int], tmp_path: Path
) -> None:
    folders = {tied: tmp_path / f"tied_{tied}" for tied in (True, False)}
    for folder in folders.values():
        folder.mkdir()
    first, last = gang.run(2, in_gang, Layout(world=2, **degrees), {tied: str(path) for tied, path in folders.items()})

    for tied, one in single.items():
        weights = reference(config(tied, (0, 1))).state_dict()
        if tied:
            del weights["lm_head.weight"]
        equal(last[tied]["logprobs"], one["logprobs"], tolerance=1e-5)
        equal(first[tied]["gradients"], one["gradients"], tolerance=1e-4)
        equal(first[tied]["weights"], weights, tolerance=0.0)
        equal(loaded_alone(tied, folders[tied]), weights, tolerance=0.0)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), name


def loaded_alone(tied: bool, checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights in a Megatron checkpoint that two processes wrote, read by one."""
    from megatron.core import dist_checkpointing

    with alone() as layout:
        model = build_model(config(tied, (0, 1)), layout, "fp32")
        model[0].load_state_dict(dist_checkpointing.load(model[0].sharded_state_dict(), str(checkpoint)))
        return {name: tensor.clone() for name, tensor in to_hf(model)}
