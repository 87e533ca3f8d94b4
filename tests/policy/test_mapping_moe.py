from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import wrong_shape_is_named
from safetensors.torch import load_file, save_file
from tiny_qwen3_vl import alone, moe_config, reference
from torch import nn

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model
from copd_megatron.weights.families.row import ExpertStack
from copd_megatron.weights.hf import HfFolder, write_folder
from copd_megatron.weights.mapping import hf_names, to_hf, to_megatron

GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"
DOWN = "model.language_model.layers.3.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.fixture(scope="module")
def model(layout: Layout) -> list[Qwen3VLModel]:
    return build_model(moe_config(dense=[1]), layout, "fp32")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """As Qwen publishes them: matrices of experts are [inputs, outputs]."""
    saved = reference(moe_config(dense=[1])).state_dict()
    return {name: tensor.transpose(1, 2) if ".experts." in name else tensor for name, tensor in saved.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_round_trip_gives_back_every_byte(layout: Layout, weights: dict[str, torch.Tensor], precision: Any) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    model = build_model(moe_config(dense=[1]), layout, precision)

    to_megatron(weights, model)
    back = dict(to_hf(model))

    assert list(back) == hf_names(model[0])
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == dtype
        assert torch.equal(back[name], tensor), name
    assert back[GATE_UP].shape == (4, 128, 96)
    assert back[DOWN].shape == (4, 48, 128)


def test_both_ways_in_which_files_hold_experts_are_read(
    model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]
) -> None:
    saved = reference(moe_config(dense=[1])).state_dict()
    assert saved[GATE_UP].shape == (4, 96, 128)

    to_megatron(saved, model)

    for name, tensor in to_hf(model):
        assert torch.equal(tensor, weights[name]), name


def test_each_expert_gets_its_own_gate_and_up(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    to_megatron(weights, model)

    experts = model[0].decoder.layers[0].mlp.experts.local_experts
    for number, expert in enumerate(experts):
        gate, up = weights[GATE_UP][number].T.chunk(2)
        assert torch.equal(expert.linear_fc1.weight, torch.cat([gate, up]))
    assert len(experts) == 4


class GroupedNames(nn.Module):
    """The same parameters under the names that Transformer Engine's grouped layers give them."""

    family = "qwen3_vl_moe"

    def __init__(self, model: Qwen3VLModel) -> None:
        super().__init__()
        self.settings, self.decoder = model.settings, model.decoder
        self.names = {
            re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name): parameter
            for name, parameter in model.named_parameters()
        }

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.names.items()


def test_transformer_engine_names_are_known(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    grouped = GroupedNames(model[0])
    assert sum("mlp.experts.linear_fc1.weight" in name for name in grouped.names) == 12

    to_megatron(weights, [grouped])

    for name, tensor in to_hf([grouped]):
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (GATE_UP, (3, 128, 96)),
        (GATE_UP, (5, 128, 96)),
        (GATE_UP, (4, 128, 94)),
        (DOWN, (4, 47, 128)),
        (DOWN, (48, 128)),
        ("model.language_model.layers.2.mlp.gate.weight", (5, 128)),
        ("model.language_model.layers.1.mlp.up_proj.weight", (383, 128)),
    ],
)
def test_wrong_shapes_are_named(
    model: list[Qwen3VLModel], weights: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> None:
    wrong_shape_is_named(model, weights, name, shape)


def test_a_dense_checkpoint_is_refused(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    del weights[GATE_UP]

    with pytest.raises(WeightsError, match=rf"the weights lack {re.escape(GATE_UP)}"):
        to_megatron(weights, model)


def test_a_folder_that_transformers_saved_reads_as_published(
    tmp_path: Path, model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]
) -> None:
    hf = reference(moe_config(dense=[1]))
    hf.save_pretrained(tmp_path / "saved")
    on_disk = load_file(tmp_path / "saved" / "model.safetensors")
    assert on_disk[DOWN].shape == (4, 128, 48)

    saved = HfFolder(tmp_path / "saved")

    assert saved.shape(DOWN) == (4, 48, 128)
    for name, tensor in saved.tensors():
        assert torch.equal(tensor, weights[name]), name
    # A folder that is as published is read as it is, and transformers reads what we write.
    to_megatron(dict(saved.tensors()), model)
    write_folder(tmp_path / "ours", to_hf(model), like=tmp_path / "saved")
    assert load_file(tmp_path / "ours" / "model.safetensors")[DOWN].shape == (4, 48, 128)
    assert torch.equal(HfFolder(tmp_path / "ours").tensor(DOWN), weights[DOWN])
    again = type(hf).from_pretrained(tmp_path / "ours")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, hf.get_parameter(name)), name


def test_other_models_folders_are_read_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "other_moe", "text_config": {"hidden_size": 128, "moe_intermediate_size": 48}}'
    )
    save_file({DOWN: torch.zeros(4, 128, 48)}, tmp_path / "model.safetensors")

    assert HfFolder(tmp_path).shape(DOWN) == (4, 128, 48)


def test_stacks_turn_their_matrices() -> None:
    stack = torch.arange(2 * 3 * 5).view(2, 3, 5)
    joint = ExpertStack(inputs=3, outputs=5)

    assert torch.equal(joint.join([stack])[1], stack[1].T)
    assert torch.equal(joint.join([stack.transpose(1, 2)])[1], stack[1].T)
    assert torch.equal(joint.split(joint.join([stack]))[0], stack)
