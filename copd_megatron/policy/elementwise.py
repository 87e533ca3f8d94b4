"""Steps between the matrix products, with hand-written gradients: rotary rotation, SwiGLU, RMS norm.

megatron-core has fused CUDA kernels for them; on a CPU its fallbacks leave a chain of small operations to autograd,
each of which reads and writes all activations. Here every step makes as few passes as torch's operators allow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotated(grad, cos, sin, -1), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """`rotate` without gradient; `direction` -1 turns back."""
    first, second = x.chunk(2, dim=-1)
    rotated = x * cos
    rotated_first, rotated_second = rotated.chunk(2, dim=-1)
    half = sin[..., : sin.shape[-1] // 2]
    rotated_first.addcmul_(second, half, value=-direction)
    rotated_second.addcmul_(first, half, value=direction)
    return rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + dim/2]) by its angle: `x` [T, heads, dim], `cos` and `sin` [T, 1, dim] of angles
    whose two halves are equal (RoPE in the half-split layout)."""
    return _Rotate.apply(x, cos, sin)  # type: ignore[no-any-return]


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        result = torch.empty_like(x)
        grad_gate, grad_up = result.chunk(2, dim=-1)
        torch.mul(activated, grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up of `x` = [gate | up], [..., 2F] to [..., F]."""
    return _SwiGLU.apply(x)  # type: ignore[no-any-return]


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        full = x.float()
        norm = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (full * scale).to(x.dtype)
        ctx.save_for_backward(normed, weight, scale)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, scale = ctx.saved_tensors
        along = (grad * normed).flatten(0, -2).float()
        mean = torch.mv(along, weight.float()).div_(weight.numel()).view_as(scale)
        grad_x = (grad * weight).float().addcmul_(normed.float(), mean, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), along.sum(0).to(weight.dtype), None


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension, in float32 inside (`Qwen3VLTextRMSNorm`).

    Under sequence parallelism a rank normalises its own tokens only; the attribute on the weight is what megatron-core
    looks for to add up the ranks' gradients.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        if x.is_cuda:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-any-return]
