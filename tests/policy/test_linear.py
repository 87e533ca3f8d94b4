"""Our linear layers beside megatron-core's, whose products are torch's."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from copd_megatron.policy.layout import Layout
from copd_megatron.policy.linear import ColumnParallelLinear, RowParallelLinear
from copd_megatron.policy.products import product

CONFIG = TransformerConfig(num_layers=1, hidden_size=24, num_attention_heads=2)
COLUMNS = {"gather_output": False}
ROWS = {"input_is_parallel": True}
KINDS = [
    (ColumnParallelLinear, layers.ColumnParallelLinear, COLUMNS),
    (RowParallelLinear, layers.RowParallelLinear, ROWS),
]


pytestmark = pytest.mark.usefixtures("base")  # which has process groups


def outcome(layer: torch.nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output of `layer`, and the gradients of its input and its parameters."""
    x = x.clone().requires_grad_()
    output, rest = layer(x)
    output = output if rest is None else output + rest
    output.backward(grad)
    grads = {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
    return {"output": output.detach(), "input": x.grad, **grads}


@pytest.mark.parametrize("skip_bias_add", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("own", "theirs", "options"), KINDS, ids=["column", "row"])
@pytest.mark.parametrize("frozen", [False, True])
def test_output_and_gradients_are_megatrons(own, theirs, options, bias, skip_bias_add, frozen) -> None:
    torch.manual_seed(0)
    options = {**options, "bias": bias, "skip_bias_add": skip_bias_add}
    ours, reference = (
        kind(24, 10, config=CONFIG, init_method=torch.nn.init.normal_, **options) for kind in (own, theirs)
    )
    for parameter in reference.parameters():
        parameter.data.normal_()
    ours.load_state_dict(reference.state_dict())
    ours.weight.requires_grad_(not frozen)
    reference.weight.requires_grad_(not frozen)
    x, grad = torch.randn(7, 1, 24), torch.randn(7, 1, 10)
    found, expected = outcome(ours, x, grad), outcome(reference, x, grad)
    assert found.keys() == expected.keys()
    assert ("weight" in found) is not frozen
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_that_of_torch(dtype, bias) -> None:
    x, weight = torch.randn(3, 5, 12).to(dtype), torch.randn(4, 12).to(dtype)
    added = torch.randn(4).to(dtype) if bias else None
    torch.testing.assert_close(product(x, weight, added), torch.nn.functional.linear(x, weight, added))


def test_every_linear_layer_of_the_policy_is_ours(base) -> None:
    from copd_megatron.policy.qwen3_vl import build_model

    (model,) = build_model(base, Layout(), "fp32")
    linears = [
        part for part in model.modules() if isinstance(part, (layers.ColumnParallelLinear, layers.RowParallelLinear))
    ]
    assert linears
    assert all(isinstance(part, (ColumnParallelLinear, RowParallelLinear)) for part in linears)
