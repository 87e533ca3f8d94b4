"""The weight table of Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from family_checks import every_byte_comes_back, wrong_shape_is_named
from tiny_qwen2_5_vl import config, published
from tiny_qwen3_vl import alone, reference

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model
from copd_megatron.weights.mapping import to_hf, to_megatron


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.fixture(scope="module")
def model(layout: Layout) -> list[Qwen3VLModel]:
    return build_model(config(), layout, "fp32")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return published(reference(config()).state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_gives_back_every_byte_of_a_folder(
    tmp_path: Path, layout: Layout, tied: bool, precision: Any
) -> None:
    ours = every_byte_comes_back(tmp_path, layout, reference(config(tied)), precision)

    assert ("lm_head.weight" in ours) is not tied
    assert {"visual.blocks.2.mlp.up_proj.bias", "model.layers.3.self_attn.v_proj.bias"} <= ours.keys()


def test_no_two_tensors_are_exchanged(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    numbered = {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(weights.items())}

    to_megatron(numbered, model)

    for name, tensor in to_hf(model):
        assert torch.equal(tensor, numbered[name]), name


def test_missing_biases_are_named(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.2.self_attn.k_proj.bias"]

    with pytest.raises(WeightsError, match=r"the weights lack model\.layers\.2\.self_attn\.k_proj\.bias"):
        to_megatron(weights, model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.1.self_attn.q_proj.bias", (119,)),
        ("model.layers.1.self_attn.k_proj.bias", (41,)),
        ("visual.blocks.0.attn.qkv.bias", (215,)),
        ("visual.blocks.0.mlp.gate_proj.bias", (99,)),
        ("visual.blocks.0.mlp.down_proj.weight", (72, 99)),
        ("visual.patch_embed.proj.weight", (72, 3, 2, 4, 5)),
        ("visual.merger.ln_q.weight", (288,)),
        ("visual.merger.mlp.2.weight", (128, 288)),
    ],
)
def test_wrong_shapes_are_named(
    model: list[Qwen3VLModel], weights: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> None:
    wrong_shape_is_named(model, weights, name, shape)
