"""Checkpoints that the policy saves on any layout give the same Hugging Face bytes, and those converted from Hugging
Face can be loaded on any: with transformers' log-probabilities."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from copd_megatron.weights.convert import to_hf, to_megatron
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.megatron_source import MegatronSource

sys.path.append(str(Path(__file__).parents[1] / "policy"))
import gang

MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "untied": {"tied": False, "deepstack": (0, 1)},
    "experts": {"experts": 4},
    "mixed": {"experts": 4, "dense": [2]},
}
"""Their vocabulary of 53 has to be padded where tensor parallelism divides it."""

FEW: list[tuple[str, dict[str, Any]]] = [
    ("tied", {"tp": 2}),
    ("untied", {"pp": 2}),
    ("mixed", {"ep": 2}),
]
ALL: list[tuple[str, dict[str, Any]]] = [
    ("untied", {"tp": 2, "sequence_parallel": True}),
    ("tied", {"pp": 2}),
    ("untied", {"pp": 2, "vpp": 2}),
    ("tied", {"tp": 2, "pp": 2}),
    ("experts", {"ep": 2}),
    ("mixed", {"tp": 2, "pp": 2, "sequence_parallel": True}),
    ("experts", {"tp": 2, "ep": 2, "sequence_parallel": True}),
    ("mixed", {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}),
    ("experts", {"ep": 2, "etp": 2}),
    ("mixed", {"pp": 2, "vpp": 2, "ep": 2}),
]


def model(kind: str) -> Any:
    """transformers' model."""
    from tiny_qwen3_vl import config, moe_config, reference

    wanted = MODELS[kind]
    return reference(moe_config(**wanted) if "experts" in wanted else config(**wanted))


def conversations() -> list[Any]:
    from tiny_qwen3_vl import conversation

    return [conversation(2, 5, [4, 6], [(1, 4, 8)]), conversation(1, 9, [5, 3])]


def load_and_save(cases: Sequence[tuple[str, dict[str, Any]]], world: int, root: Path) -> list[torch.Tensor]:
    """For each case: load the converted checkpoint, compute log-probabilities, and save a checkpoint again."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from tiny_qwen3_vl import pack

    from copd_megatron.policy import checkpoint
    from copd_megatron.policy import layout as process_layout
    from copd_megatron.policy.layout import Layout
    from copd_megatron.policy.qwen3_vl import build_model
    from copd_megatron.policy.schedule import logprob_pass, sum_gradients

    found = []
    for number, (kind, degrees) in enumerate(cases):
        layout = Layout(world=world, **degrees)
        process_layout.initialize(layout)
        chunks = build_model(root / kind, layout, "fp32")
        state = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
        loaded = dist_checkpointing.load(state, str(root / f"{kind}_converted"))
        for index, chunk in enumerate(chunks):
            chunk.load_state_dict(loaded[f"model{index}"])
            sum_gradients(chunk.config)
        wrapped = [DistributedDataParallel(each.config, DistributedDataParallelConfig(), each) for each in chunks]
        found += logprob_pass(wrapped, [pack(conversations())], 1.0)
        folder = root / f"saved_{number}"
        folder.mkdir(exist_ok=True)
        state = {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
        checkpoint.write_tensors(state, folder)
        parallel_state.destroy_model_parallel()
    process_layout.shutdown()
    return found


@pytest.mark.parametrize(
    ("world", "cases"), [(2, FEW), pytest.param(4, ALL, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_any_layout_loads_what_is_converted_and_saves_what_converts_back(
    tmp_path: Path, world: int, cases: list[tuple[str, dict[str, Any]]]
) -> None:
    from tiny_qwen3_vl import reference_logits

    from copd_megatron.objectives.vocabulary import token_logprobs

    targets = torch.tensor([token for each in conversations() for answer in each.responses for token in answer])
    expected = {}
    for kind in {kind for kind, _ in cases}:
        hf = model(kind)
        hf.save_pretrained(tmp_path / kind)
        to_megatron(tmp_path / kind, tmp_path / f"{kind}_converted")
        with torch.no_grad():
            expected[kind] = token_logprobs(reference_logits(hf, conversations()), targets, 1.0)

    by_rank = gang.run(world, load_and_save, cases, world, tmp_path)

    for number, (kind, degrees) in enumerate(cases):
        for ranks in by_rank:
            assert (ranks[number] - expected[kind]).abs().max() <= 1e-5, degrees
        saved, base = tmp_path / f"saved_{number}", tmp_path / kind
        to_hf(saved, tmp_path / f"again_{number}", base=base, trust=True)
        assert same(tmp_path / f"again_{number}", base), degrees
        assert MegatronSource(saved, base, trust=True).padding() == degrees.get("tp", 1) - 1


def same(folder: Path, other: Path) -> bool:
    """Whether two folders hold the same tensors, bit by bit."""
    one, two = HfFolder(folder), HfFolder(other)
    return one.names() == two.names() and all(
        one.dtype(name) == two.dtype(name) and torch.equal(one.tensor(name), two.tensor(name)) for name in one.names()
    )


def train_and_save(base: Path, root: Path, degrees: dict[str, Any]) -> None:
    """A checkpoint of a run after an update, with the optimizer's state; beside it the weights by Hugging Face name."""
    from tiny_policy import make_samples, new_policy, toy_loss, weights_of

    from copd_megatron.policy import checkpoint
    from copd_megatron.policy import layout as process_layout
    from copd_megatron.policy.layout import Layout

    layout = Layout(world=2, **degrees)
    process_layout.initialize(layout)
    policy = new_policy(base, layout, distributed=True)
    rank, size = process_layout.data_parallel_rank(), process_layout.data_parallel_size()
    policy.update(make_samples(base, prompts=4, group=2)[rank::size], toy_loss)
    checkpoint.save(policy, root / "step_0000001", {})
    weights = weights_of(policy)
    if torch.distributed.get_rank() == 0:
        save_file(weights, root / "weights.safetensors")
    process_layout.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"ep": 2}, {"pp": 2}], ids=["ep2", "pp2"])
def test_checkpoint_of_a_gang_in_training_converts(tmp_path: Path, degrees: dict[str, Any]) -> None:
    """With divided experts each kind of parameter has an optimizer of its own."""
    from tiny_policy import SIZE

    from copd_megatron.data.mini.model import build

    base = tmp_path / "base"
    build(base, 0, replace(SIZE, experts=4, expert_mlp=24))
    gang.run(2, train_and_save, base, tmp_path, degrees)
    to_hf(tmp_path / "step_0000001", tmp_path / "out", base=base)
    trained = load_file(tmp_path / "weights.safetensors")
    out, before = HfFolder(tmp_path / "out"), HfFolder(base)
    assert out.names() == sorted(trained) == before.names()
    assert all(torch.equal(out.tensor(name), trained[name]) for name in trained)
    assert not any(torch.equal(trained[name], before.tensor(name)) for name in trained if "mlp" in name)
