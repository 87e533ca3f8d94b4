"""Hand-written gradients against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from copd_megatron.policy.elementwise import RMSNorm, rotate, swiglu


def plain_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def plain_swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    full = x.float()
    return weight * (full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def compare(fast: Callable[..., torch.Tensor], slow: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    one, other = fast(*leaves), slow(*leaves)
    grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(1)).to(one.dtype)
    tolerance = 2e-5 if one.dtype == torch.float32 else 4e-2
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    for found, expected in zip(
        torch.autograd.grad(one, leaves, grad), torch.autograd.grad(other, leaves, grad), strict=True
    ):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 3, 16), (1, 1, 2), (5, 2, 64)])
def test_rotate(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    angles = torch.randn(shape[0], 1, shape[2] // 2, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    compare(lambda x: rotate(x, cos, sin), lambda x: plain_rotate(x, cos, sin), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 12), (2, 2), (3, 1, 256)])
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(swiglu, plain_swiglu, torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype) * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 1, 12), (5, 1, 3, 8), (3, 1, 256)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=generator).to(dtype) * 3,
        torch.randn(shape[-1], generator=generator).to(dtype),
    )
    norm = RMSNorm(SimpleNamespace(params_dtype=dtype, sequence_parallel=False), shape[-1], 1e-6)

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        del norm.weight
        norm.weight = weight
        return norm(x)

    compare(ours, plain_norm, x, weight)
