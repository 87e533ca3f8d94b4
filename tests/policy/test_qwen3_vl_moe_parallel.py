"""Experts spread over processes compute what transformers does on one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gang
import pytest
import torch
from tiny_qwen3_vl import conversation, moe_config, pack, reference, reference_logits

from copd_megatron.objectives.vocabulary import Vocabulary, token_logprobs
from copd_megatron.policy import layout as process_layout
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.packed import MicroBatch, Signals
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.weights.mapping import to_hf, to_megatron

CONVERSATIONS = [
    [conversation(2, 5, [4, 6], [(1, 4, 8)]), conversation(1, 9, [5, 3])],
    [conversation(6, 7, [6, 1], [(1, 4, 8), (1, 2, 2)])],
    [conversation(7, 12, [1, 8, 2, 5])],
]
"""Three micro-batches: with two replicas or more some have fewer to do than others."""

TWO: list[dict[str, Any]] = [{"ep": 2}, {"tp": 2, "sequence_parallel": True}]
FOUR: list[dict[str, Any]] = [
    {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    {"pp": 2, "vpp": 2, "ep": 2},
    {"cp": 2, "ep": 2, "etp": 2},
]
Result = dict[str, dict[str, torch.Tensor]]


def batches() -> list[MicroBatch]:
    """Every response token counts differently: by its weight."""
    packed = [pack(each) for each in CONVERSATIONS]
    signals = [replace(batch.signals, weight=torch.linspace(-1.0, 2.0, len(batch.targets))) for batch in packed]
    return [replace(batch, signals=each) for batch, each in zip(packed, signals, strict=True)]


def loss(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, vocabulary: Vocabulary | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (token_logprobs(logits, targets, 1.0, vocabulary) * signals.weight).sum(), {}


def gradients(degrees: dict[str, Any], world: int) -> Result:
    """Log-probabilities of this replica's micro-batches, and on the leader the Hugging Face named gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from copd_megatron.policy.schedule import logprob_pass, sum_gradients, train_pass

    layout = Layout(world=world, **degrees)
    process_layout.initialize(layout)
    try:
        hf = reference(moe_config(dense=[1]))
        chunks = []
        for chunk in build_model(hf.config, layout, "fp32"):
            sum_gradients(chunk.config)
            chunks.append(DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk))
        to_megatron(hf.state_dict(), chunks)
        own = slice(process_layout.data_parallel_rank(), None, layout.dp)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        total, _ = train_pass(chunks, batches()[own], loss)
        logprobs = logprob_pass(chunks, batches()[own], 1.0)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.main_grad
        numbers = range(len(CONVERSATIONS))[own]
        return {
            "loss": {"total": torch.tensor(total)},
            "logprobs": {str(number): each for number, each in zip(numbers, logprobs, strict=True)},
            "gradients": {name: tensor.clone() for name, tensor in to_hf(chunks)},
        }
    finally:
        parallel_state.destroy_model_parallel()


def in_gang(layouts: list[dict[str, Any]], world: int) -> list[Result]:
    try:
        return [gradients(degrees, world) for degrees in layouts]
    finally:
        process_layout.shutdown()


@pytest.fixture(scope="module")
def alone() -> Result:
    """What transformers computes."""
    hf = reference(moe_config(dense=[1]))
    total, logprobs = torch.zeros(()), {}
    for number, (conversations, batch) in enumerate(zip(CONVERSATIONS, batches(), strict=True)):
        logits = reference_logits(hf, conversations)
        logprobs[str(number)] = token_logprobs(logits.detach(), batch.targets, 1.0)
        total = total + loss(logits, batch.targets, batch.signals)[0]
    total.backward()
    named = {name: parameter.grad for name, parameter in hf.named_parameters()}
    turned = {name: grad.transpose(1, 2) if ".experts." in name else grad for name, grad in named.items()}
    return {"loss": {"total": total.detach()}, "logprobs": logprobs, "gradients": turned}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layouts"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_processes_compute_what_transformers_does(alone: Result, world: int, layouts: list[dict[str, Any]]) -> None:
    by_rank = gang.run(world, in_gang, layouts, world)

    for number, degrees in enumerate(layouts):
        results = [ranks[number] for ranks in by_rank]
        for result in results:
            equal(result["loss"], alone["loss"], 1e-5, degrees)
            equal(result["logprobs"], {key: alone["logprobs"][key] for key in result["logprobs"]}, 1e-5, degrees)
        assert {key for result in results for key in result["logprobs"]} == alone["logprobs"].keys()
        leaders = [result["gradients"] for result in results if result["gradients"]]
        assert len(leaders) == Layout(world=world, **degrees).dp
        for found in leaders:
            equal(found, alone["gradients"], 1e-4, degrees)


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float, where: object) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), f"{name} under {where}"
