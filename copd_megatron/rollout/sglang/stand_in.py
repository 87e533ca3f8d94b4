"""What lets a stock sglang 0.5.23 serve on a machine without a GPU. No file of sglang is touched.

Its kernel package `sgl_kernel` has no CPU build on PyPI. With `--attention-backend torch_native` sglang's CPU engine
calls two kernels of it, which are given here in torch; every other name can be imported and raises when it is called,
so that a path which was never tried cannot give wrong numbers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import xxhash

from copd_megatron.policy.platform import declare_torchvision_schemas

_OPERATORS = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)
"""Operators of `torch.ops.sgl_kernel` that modules of sglang look up when they are imported."""


_WORD = 0xFFFFFFFF

_operators = torch.library.Library("sgl_kernel", "FRAGMENT")


@cache
def install() -> None:
    """Make sglang's CPU engine importable in this process. Does nothing where `sgl_kernel` is installed."""
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    declare_torchvision_schemas()
    if importlib.util.find_spec("sgl_kernel") is not None:
        return
    sys.meta_path.append(_Finder())
    for name in _OPERATORS:
        if not hasattr(torch.ops.sgl_kernel, name):
            setattr(torch.ops.sgl_kernel, name, _Missing(f"torch.ops.sgl_kernel.{name}"))
    _seeds()
    _hand_overs()


def _hand_overs() -> None:
    """Two things of sglang's that take longer on a CPU than new weights do, and that are not needed there: a search
    through all of Python's memory whenever the prefix cache is flushed (CPython does that by itself, as needed), and
    SHA-256 of every weight, where xxHash tells as well whether two servers hold the same bytes."""
    from sglang.srt.platforms.cpu import CpuDeviceMixin
    from sglang.srt.utils import weight_checker

    CpuDeviceMixin.empty_cache = lambda self: None
    weight_checker._hash_tensor = _hash_tensor


def _hash_tensor(tensor: torch.Tensor) -> str:
    words = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(words.numpy())  # type: ignore[arg-type]


def _seeds() -> None:
    """sglang heeds the seed of a request in its deterministic mode alone, which it allows for some attention kernels
    and GPUs. Torch's attention computes one sequence at a time, so that what else is in the batch matters to rounding
    in matrix products only: the same seed gives the same tokens, but for draws within that rounding."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.add_deterministic_attention_backend_choices(["torch_native"])
    choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    batch_invariant_ops.enable_batch_invariant_mode = lambda *arguments, **keywords: None
    _operators.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor columns) -> Tensor")
    _operators.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (Austin Appleby, x86, 32 bits) of seed (two words), position and column: uint32 [rows, columns].

    `seed` uint64 [rows], `positions` int [rows], `columns` int [columns]. Arithmetic is int64, whose lower 32 bits
    come out right when a product overflows.
    """
    seed = seed.view(torch.int64)[:, None]
    words = (seed & _WORD, (seed >> 32) & _WORD, positions.long()[:, None] & _WORD, columns.long()[None] & _WORD)
    value = torch.zeros(1, 1, dtype=torch.int64)
    for word in words:
        word = _rotated(word * 0xCC9E2D51 & _WORD, 15) * 0x1B873593 & _WORD
        value = _rotated(value ^ word, 13) * 5 + 0xE6546B64 & _WORD
    value = value ^ 4 * len(words)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        value = (value ^ value >> shift) * factor & _WORD
    return (value ^ value >> 16).to(torch.uint32)


def _rotated(words: torch.Tensor, bits: int) -> torch.Tensor:
    return (words << bits | words >> 32 - bits) & _WORD


def assign_req_to_token_pool_cpu(
    requests: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    pool_length: int,
) -> None:
    """Write the key-value slots of newly computed tokens to the rows of `table`, as sglang's own kernel does.

    `requests`, `starts`, `ends` int64 [requests]: row of each request in `table` [requests, pool_length], and the
    range of its new tokens there; `slots` holds their places in the cache, one request after another.
    """
    offset = 0
    for request, start, end in zip(requests.tolist(), starts.tolist(), ends.tolist(), strict=False):
        table[request, start:end] = slots[offset : offset + end - start].to(table.dtype)
        offset += end - start


class _Missing:
    """A name that may be imported and looked into, but not called."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"{self.__name__} has no CPU kernel; use a GPU, or do without this feature")


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == assign_req_to_token_pool_cpu.__name__:
            return assign_req_to_token_pool_cpu
        return _Missing(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "sgl_kernel":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to execute."""
