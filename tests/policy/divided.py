"""A model divided among processes against transformers' own on one: loss, log-probabilities and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gang
import torch
from tiny_qwen3_vl import Conversation, pack, reference, reference_logits

from copd_megatron.objectives.vocabulary import Vocabulary, token_logprobs
from copd_megatron.policy import layout as process_layout
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.packed import MicroBatch, Signals
from copd_megatron.weights.mapping import to_hf, to_megatron

Named = Mapping[str, torch.Tensor]
Result = dict[str, Named]
Case = tuple[Any, Mapping[str, Any]]
"""A configuration of a model, and the degrees of its layout."""
Published = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def check(world: int, cases: Sequence[Case], batches: Sequence[Sequence[Conversation]], published: Published) -> None:
    """In each of `cases` the model, divided among `world` processes, computes what transformers does.

    With replicas, some have fewer of the micro-batches `batches` than others. `published` turns the tensors of a
    transformers module into those of published files.
    """
    by_rank = gang.run(world, _in_gang, world, cases, batches, published)
    for number, (hf_config, degrees) in enumerate(cases):
        alone = _alone(hf_config, batches, published)
        results = [ranks[number] for ranks in by_rank]
        for result in results:
            _equal(result["loss"], alone["loss"], 1e-5, degrees)
            _equal(result["logprobs"], {key: alone["logprobs"][key] for key in result["logprobs"]}, 1e-5, degrees)
        assert {key for result in results for key in result["logprobs"]} == alone["logprobs"].keys()
        leaders = [result for result in results if result["gradients"]]
        assert len(leaders) == Layout(world=world, **degrees).dp
        for leader in leaders:
            _equal(leader["gradients"], alone["gradients"], 1e-4, degrees)
            _equal(leader["weights"], alone["weights"], 0.0, degrees)


def _alone(hf_config: Any, batches: Sequence[Sequence[Conversation]], published: Published) -> Result:
    hf = reference(hf_config)
    total, logprobs = torch.zeros(()), {}
    for number, (conversations, batch) in enumerate(zip(batches, _packed(batches), strict=True)):
        logits = reference_logits(hf, conversations)
        logprobs[str(number)] = token_logprobs(logits.detach(), batch.targets, 1.0)
        total = total + _loss(logits, batch.targets, batch.signals)[0]
    total.backward()
    named = dict(hf.named_parameters())
    return {
        "loss": {"total": total.detach()},
        "logprobs": logprobs,
        "gradients": published({name: parameter.grad for name, parameter in named.items()}),
        "weights": published({name: parameter.detach() for name, parameter in named.items()}),
    }


def _in_gang(
    world: int, cases: Sequence[Case], batches: Sequence[Sequence[Conversation]], published: Published
) -> list[Result]:
    try:
        return [_divided(config, batches, Layout(world=world, **degrees), published) for config, degrees in cases]
    finally:
        process_layout.shutdown()


def _divided(hf_config: Any, batches: Sequence[Sequence[Conversation]], layout: Layout, published: Published) -> Result:
    """Log-probabilities of this replica's micro-batches, and on its leader the weights and their gradients."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from copd_megatron.policy.qwen3_vl import build_model
    from copd_megatron.policy.schedule import logprob_pass, sum_gradients, train_pass

    process_layout.initialize(layout)
    try:
        hf = reference(hf_config)
        chunks = []
        for chunk in build_model(hf.config, layout, "fp32"):
            sum_gradients(chunk.config)
            chunks.append(DistributedDataParallel(chunk.config, DistributedDataParallelConfig(), chunk))
        to_megatron(published(hf.state_dict()), chunks)
        weights = {name: tensor.clone() for name, tensor in to_hf(chunks)}
        own = slice(process_layout.data_parallel_rank(), None, layout.dp)
        for chunk in chunks:
            chunk.zero_grad_buffer()
        total, _ = train_pass(chunks, _packed(batches)[own], _loss)
        logprobs = logprob_pass(chunks, _packed(batches)[own], 1.0)
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.data = parameter.main_grad
        return {
            "loss": {"total": torch.tensor(total)},
            "logprobs": dict(zip(map(str, range(len(batches))[own]), logprobs, strict=True)),
            "gradients": {name: tensor.clone() for name, tensor in to_hf(chunks)},
            "weights": weights,
        }
    finally:
        parallel_state.destroy_model_parallel()


def _packed(batches: Sequence[Sequence[Conversation]]) -> list[MicroBatch]:
    """Every response token counts differently: by its weight."""
    packed = [pack(each) for each in batches]
    signals = [replace(batch.signals, weight=torch.linspace(-1.0, 2.0, len(batch.targets))) for batch in packed]
    return [replace(batch, signals=each) for batch, each in zip(packed, signals, strict=True)]


def _loss(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, vocabulary: Vocabulary | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return (token_logprobs(logits, targets, 1.0, vocabulary) * signals.weight).sum(), {}


def _equal(found: Named, expected: Named, tolerance: float, where: object) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= tolerance * tensor.norm(), f"{name} under {where}"
