from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from family_checks import wrong_shape_is_named
from tiny_qwen3_vl import alone, config, reference
from torch import nn

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model
from copd_megatron.weights.families.row import Flattened, FusedQueryKeyValue, Padded, QueryKeyValue, Stacked
from copd_megatron.weights.mapping import hf_names, to_hf, to_megatron


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    with alone() as single:
        yield single


@pytest.fixture(scope="module")
def model(layout: Layout) -> list[Qwen3VLModel]:
    return build_model(config(tied=False, deepstack=(0, 1)), layout, "fp32")


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return dict(reference(config(tied=False, deepstack=(0, 1))).state_dict())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_gives_back_every_byte(layout: Layout, tied: bool, precision: Any) -> None:
    hf = reference(config(tied, (0, 1)))
    hf = hf.bfloat16() if precision == "bf16" else hf
    model = build_model(hf.config, layout, precision)

    to_megatron(hf.state_dict(), model)
    back = dict(to_hf(model))

    expected = dict(hf.named_parameters())  # names a tied tensor once, as Hugging Face saves it
    assert ("lm_head.weight" in expected) is not tied
    assert list(back) == hf_names(model[0])
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].shape == tensor.shape
        assert torch.equal(back[name], tensor), name


def test_no_two_tensors_are_exchanged(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    numbered = {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(weights.items())}

    to_megatron(numbered, model)

    for name, tensor in to_hf(model):
        assert torch.equal(tensor, numbered[name]), name


def test_missing_tensors_are_named(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    del weights["model.language_model.layers.2.self_attn.k_proj.weight"], weights["lm_head.weight"]

    with pytest.raises(
        WeightsError, match=r"lack 2 tensors: lm_head\.weight, model\.language_model\.layers\.2\.self_attn\.k"
    ):
        to_megatron(weights, model)


def test_unexpected_tensors_are_named(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    weights["model.language_model.layers.4.mlp.up_proj.weight"] = torch.zeros(1)

    with pytest.raises(WeightsError, match=r"no place for model\.language_model\.layers\.4\.mlp\.up_proj\.weight"):
        to_megatron(weights, model)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.language_model.embed_tokens.weight", (54, 128)),
        ("model.language_model.layers.0.mlp.gate_proj.weight", (383, 128)),
        ("model.language_model.layers.1.self_attn.q_proj.weight", (127, 128)),
        ("model.visual.blocks.0.attn.qkv.weight", (287, 96)),
        ("model.visual.patch_embed.proj.weight", (96, 3, 2, 4, 5)),
        ("model.visual.merger.norm.weight", (384,)),
    ],
)
def test_wrong_shapes_are_named(
    model: list[Qwen3VLModel], weights: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]
) -> None:
    wrong_shape_is_named(model, weights, name, shape)


def test_a_tied_model_accepts_a_checkpoint_that_repeats_the_embedding(layout: Layout) -> None:
    hf = reference(config(tied=True))
    model = build_model(hf.config, layout, "fp32")
    weights = dict(hf.named_parameters())

    to_megatron({**weights, "lm_head.weight": weights["model.language_model.embed_tokens.weight"]}, model)

    assert dict(to_hf(model)).keys() == weights.keys()


class TransformerEngineNames(nn.Module):
    """The same parameters under the names that Transformer Engine's fused layers give them."""

    family = "qwen3_vl"
    renamed = (
        ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
        ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    )

    def __init__(self, model: Qwen3VLModel) -> None:
        super().__init__()
        self.settings, self.decoder = model.settings, model.decoder
        self.names = {}
        for name, parameter in model.named_parameters():
            for plain, fused in self.renamed:
                name = name.replace(plain, fused)
            self.names[name] = parameter

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.names.items()


def test_transformer_engine_names_are_known(model: list[Qwen3VLModel], weights: dict[str, torch.Tensor]) -> None:
    fused = TransformerEngineNames(model[0])
    assert sum("linear_qkv.layer_norm_weight" in name for name in fused.names) == 7

    to_megatron(weights, [fused])

    for name, tensor in to_hf([fused]):
        assert torch.equal(tensor, weights[name]), name


def test_a_parameter_that_the_table_forgets_is_an_error(layout: Layout) -> None:
    hf = reference(config())
    model = build_model(hf.config, layout, "fp32")
    model[0].vision.extra = nn.Parameter(torch.zeros(1))

    with pytest.raises(WeightsError, match=r"no row of the weight table gives vision\.extra"):
        to_megatron(hf.state_dict(), model)


def test_joints_place_rows_where_megatron_looks_for_them() -> None:
    def rows(*numbers: int) -> torch.Tensor:
        return torch.tensor(numbers).float()[:, None]

    query, key, value = rows(0, 1, 2, 3), rows(10, 11), rows(20, 21)
    assert QueryKeyValue(4, 2).join([query, key, value]).flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    fused = rows(0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23)
    assert FusedQueryKeyValue(2).join([fused]).flatten().tolist() == [0, 1, 10, 11, 20, 21, 2, 3, 12, 13, 22, 23]
    assert Stacked().join([query, key]).flatten().tolist() == [0, 1, 2, 3, 10, 11]
    assert Padded(2, 3).join([key]).flatten().tolist() == [10, 11, 0]
    assert Flattened((2, 3)).join([torch.arange(12).view(2, 2, 3)]).tolist() == [list(range(6)), list(range(6, 12))]
