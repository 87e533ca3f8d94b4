"""Every way of dividing a model gives back the Hugging Face tensors it was given, on the leader of each replica."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from tiny_qwen3_vl import alone, config, moe_config, reference

from copd_megatron.policy import layout as process_layout
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.weights.mapping import hf_names, to_hf, to_megatron

DENSE: list[dict[str, Any]] = [
    {"tp": 2, "cp": 2},
    {"tp": 2, "pp": 2, "sequence_parallel": True},
    {"pp": 2, "vpp": 2},
]
EXPERTS: list[dict[str, Any]] = [
    {"ep": 4},
    {"ep": 2, "cp": 2},
    {"pp": 2, "vpp": 2, "ep": 2},
    {"tp": 2, "sequence_parallel": True},
    {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    {"tp": 2, "ep": 2, "sequence_parallel": True},
    {"ep": 2, "etp": 2},
    {"tp": 2, "cp": 2, "ep": 4, "etp": 1, "sequence_parallel": True},
]


def round_trip(hf_config: Any, degrees: dict[str, Any]) -> dict[str, Any]:
    from megatron.core import parallel_state

    layout = Layout(world=4, **degrees)
    process_layout.initialize(layout)
    try:
        model = build_model(hf_config, layout, "fp32")
        weights = reference(hf_config).state_dict()
        weights = {name: tensor.transpose(1, 2) if ".experts." in name else tensor for name, tensor in weights.items()}
        to_megatron(weights, model)
        back = dict(to_hf(model))
        leads = process_layout.is_replica_leader()
        assert list(back) == (hf_names(model[0]) if leads else [])
        assert not leads or back.keys() == weights.keys()
        for name, tensor in back.items():
            assert torch.equal(tensor, weights[name]), name
        held = sum(parameter.numel() for chunk in model for parameter in chunk.parameters())
        assert held < sum(tensor.numel() for tensor in weights.values())
        return {"chunks": len(model), "leads": leads}
    finally:
        parallel_state.destroy_model_parallel()


def round_trips() -> list[dict[str, Any]]:
    dense, sparse = config(tied=False, deepstack=(0, 1)), moe_config(dense=[2])
    try:
        return [
            *(round_trip(dense, degrees) for degrees in DENSE),
            *(round_trip(sparse, degrees) for degrees in EXPERTS),
        ]
    finally:
        process_layout.shutdown()


@pytest.mark.slow
def test_every_layout_gives_back_every_byte() -> None:
    by_rank = gang.run(4, round_trips)

    for number, degrees in enumerate(DENSE + EXPERTS):
        results = [ranks[number] for ranks in by_rank]
        layout = Layout(world=4, **degrees)
        assert sum(result["leads"] for result in results) == layout.dp, degrees
        assert all(result["chunks"] == layout.vpp for result in results)


def save(degrees: dict[str, Any], folder: str) -> None:
    from megatron.core import dist_checkpointing

    layout = Layout(world=2, **degrees)
    process_layout.initialize(layout)
    sparse = moe_config(dense=[2])
    model = build_model(sparse, layout, "fp32")
    to_megatron(reference(sparse).state_dict(), model)
    dist_checkpointing.save(model[0].sharded_state_dict(), folder)
    process_layout.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"ep": 2}, {"tp": 2, "sequence_parallel": True}], ids=["ep", "etp"])
def test_one_process_reads_the_checkpoint_of_spread_experts(degrees: dict[str, Any], tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    gang.run(2, save, degrees, str(tmp_path))

    hf = reference(moe_config(dense=[2]))
    with alone() as layout:
        model = build_model(hf.config, layout, "fp32")
        model[0].load_state_dict(dist_checkpointing.load(model[0].sharded_state_dict(), str(tmp_path)))
        for name, tensor in to_hf(model):
            saved = hf.get_parameter(name)
            assert torch.equal(tensor, saved.transpose(1, 2) if ".experts." in name else saved), name
