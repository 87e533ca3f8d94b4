"""A gradient that was formed together with its loss, hung into the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


def with_gradient(logits: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
    """`loss` [T], whose gradient with respect to `logits` [T, V] is, row by row, `gradient` [T, V].

    The backward pass multiplies rows by what arrives, in place: where every row's is 1 (a sum of losses) nothing is
    read or written. So it can run once. If `gradient` took the logits' memory, whoever kept them for its own backward
    pass is told by autograd.
    """
    if gradient.data_ptr() == logits.data_ptr() and gradient.numel():
        torch.autograd.graph.increment_version(logits)
    return _Finished.apply(logits, loss, [gradient])  # type: ignore[no-any-return]


class _Finished(Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.gradient:
            raise RuntimeError(
                "the gradient was formed with the loss and has been used up by the first backward pass; "
                'call with gradient="later" to run it again'
            )
        return scale_rows(ctx.gradient.pop(), grad), None, None


def scale_rows(gradient: Tensor, factors: Tensor) -> Tensor:
    """`gradient` [T, V], each row times its factor [T], in place."""
    from copd_kernels.device import launch
    from copd_kernels.device.rows import scale_rows_kernel

    factors = factors.float().contiguous()
    launch.run(
        scale_rows_kernel, "rows", len(gradient),
        gradient, factors, gradient.shape[1], gradient.stride(0),
        widths=(gradient.shape[1], gradient.stride(0)), BLOCK=launch.BLOCK,
    )  # fmt: skip
    return gradient
