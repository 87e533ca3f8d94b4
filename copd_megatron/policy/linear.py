"""Linear layers for a CPU: megatron-core's, with our products forward and for the input's gradient.

The weight's gradient stays with torch, whose product of two tall matrices is the faster one.
"""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel import layers
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from copd_megatron.policy.products import product


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        return (
            product(grad, weight.t().contiguous(), None),
            rows.t().matmul(x.flatten(0, -2)),
            rows.sum(0) if ctx.has_bias else None,
        )


class _OnCPU:
    """Where a layer has nothing to send or to gather, its product is ours; otherwise megatron-core overlaps the two."""

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None = None, **how: Any) -> Tensor:
        if input.is_cuda or how["allreduce_dgrad"] or how["sequence_parallel"] or not weight.requires_grad:
            return super()._forward_impl(input, weight, bias, **how)  # type: ignore[misc,no-any-return]
        return _Linear.apply(input, weight, bias)  # type: ignore[no-any-return]


class ColumnParallelLinear(_OnCPU, layers.ColumnParallelLinear):
    """x @ weight.T with the weight's rows shared out."""


class RowParallelLinear(_OnCPU, layers.RowParallelLinear):
    """x @ weight.T with the weight's columns shared out."""


def use_own_linears(spec: ModuleSpec) -> None:
    """Exchange megatron-core's linear layers in the submodules of `spec`, at any depth, for those above."""
    own: dict[type, type] = {
        layers.ColumnParallelLinear: ColumnParallelLinear,
        layers.RowParallelLinear: RowParallelLinear,
    }
    for name, part in vars(spec.submodules).items():
        if isinstance(part, ModuleSpec):
            if part.submodules is not None:
                use_own_linears(part)
        elif isinstance(part, type) and part in own:
            setattr(spec.submodules, name, own[part])
