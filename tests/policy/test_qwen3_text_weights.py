"""The weight tables of models that take text alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import every_byte_comes_back, wrong_shape_is_named
from tiny_qwen3_text import dense, published, sparse
from tiny_qwen3_vl import alone, reference

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model
from copd_megatron.weights.families.row import EachExpert
from copd_megatron.weights.mapping import hf_names, to_hf, to_megatron

MODELS = {
    "dense": dense(),
    "dense, untied": dense(tied=False),
    "experts": sparse([1]),
    "experts, tied": sparse([1], tied=True),
}
GATE, UP, DOWN = (f"model.layers.2.mlp.experts.3.{projection}_proj.weight" for projection in ("gate", "up", "down"))


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.fixture(scope="module")
def model(layout: Layout) -> list[Qwen3VLModel]:
    return build_model(sparse([1]), layout, "fp32")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return published(reference(sparse([1])).state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
def test_round_trip_gives_back_every_byte_of_a_folder(
    tmp_path: Path, layout: Layout, hf_config: Any, precision: Any
) -> None:
    ours = every_byte_comes_back(tmp_path, layout, reference(hf_config), precision)

    assert ("lm_head.weight" in ours) is not hf_config.tie_word_embeddings


@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
def test_no_two_tensors_are_exchanged(layout: Layout, hf_config: Any) -> None:
    weights = published(reference(hf_config).state_dict())
    numbered = {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(weights.items())}
    model = build_model(hf_config, layout, "fp32")

    to_megatron(numbered, model)

    for name, tensor in to_hf(model):
        assert torch.equal(tensor, numbered[name]), name


def test_names_are_those_that_qwen_publishes(model: list[Qwen3VLModel]) -> None:
    names = hf_names(model[0])

    assert {GATE, UP, DOWN, "model.layers.2.mlp.gate.weight", "model.layers.1.mlp.gate_proj.weight"} <= set(names)
    assert not any("gate_up_proj" in name for name in names)
    assert len(names) == 3 + 4 * 8 + 3 + 3 * (1 + 3 * 4)


def test_each_expert_gets_its_own_gate_and_up(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    to_megatron(weights, model)

    expert = model[0].decoder.layers[2].mlp.experts.local_experts[3]
    assert torch.equal(expert.linear_fc1.weight, torch.cat([weights[GATE], weights[UP]]))
    assert torch.equal(expert.linear_fc2.weight, weights[DOWN])


def test_missing_and_unexpected_experts_are_named(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    up = weights.pop(UP)
    with pytest.raises(WeightsError, match=r"the weights lack model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight"):
        to_megatron(weights, model)

    weights |= {UP: up, UP.replace("experts.3", "experts.4"): up}
    with pytest.raises(WeightsError, match=r"no place for model\.layers\.2\.mlp\.experts\.4\.up_proj\.weight"):
        to_megatron(weights, model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (UP, (51, 104)),
        (DOWN, (104, 51)),
        ("model.layers.2.mlp.gate.weight", (5, 104)),
        ("model.layers.1.mlp.up_proj.weight", (147, 104)),
        ("model.layers.0.self_attn.q_norm.weight", (19,)),
    ],
)
def test_wrong_shapes_are_named(
    model: list[Qwen3VLModel], weights: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> None:
    wrong_shape_is_named(model, weights, name, shape)


def test_experts_of_a_smaller_model_are_refused(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    smaller = {
        name: tensor[:, :51] if name.endswith("down_proj.weight") else tensor for name, tensor in weights.items()
    }

    with pytest.raises(WeightsError, match=r"down_proj\.weight \[104, 51\]"):
        to_megatron(smaller, model)


def test_experts_stand_above_each_other() -> None:
    gates, ups = torch.arange(12.0).view(2, 3, 2), torch.arange(12.0, 24.0).view(2, 3, 2)
    parts = [gates[0], ups[0], gates[1], ups[1]]

    full = EachExpert(2).join(parts)

    assert torch.equal(full, torch.cat([gates, ups], dim=1))
    assert all(torch.equal(one, other) for one, other in zip(EachExpert(2).split(full), parts, strict=True))
