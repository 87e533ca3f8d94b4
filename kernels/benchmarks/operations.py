"""What is measured: our operation, the same by others, and the bytes or operations that it cannot do without."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from copd_kernels import reference
from copd_kernels.linear_token_kl import TopK, linear_token_kl
from copd_kernels.token_kl import token_kl
from copd_kernels.topk import topk_overlap
from copd_kernels.topk_kl import topk_kl

TOP_K = 64
NAMES = ("overlap", "token_kl", "topk_kl", "linear_token_kl")


@dataclass(frozen=True)
class Operation:
    """`ours` and `peers` do the same work, loss and gradient where there is one.

    `bytes` is what has to be read from and written to memory once, `operations` the floating-point operations of matrix
    products; the time that either takes at the machine's measured rate is the operation's floor.
    """

    name: str
    bytes: int
    operations: int
    ours: Callable[[], object]
    peers: Mapping[str, Callable[[], object]] = field(default_factory=dict)


def build(name: str, tokens: int, vocabulary: int, hidden: int, device: str, dtype: torch.dtype) -> Operation:
    """Operation `name` of `NAMES` on random inputs of one seed."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    ids = torch.randint(vocabulary - TOP_K, (tokens, 1), generator=generator, device=device)
    ids = ids + torch.arange(TOP_K, device=device)
    logprobs = torch.full(ids.shape, 0.8 / TOP_K, device=device).log()
    size = tokens * vocabulary * torch.empty(0, dtype=dtype).element_size()
    if name == "linear_token_kl":
        states, lm_head = random(tokens, hidden).requires_grad_(), (0.02 * random(vocabulary, hidden)).requires_grad_()
        fused = lambda: linear_token_kl(states, lm_head, TopK(ids, logprobs), "reverse").total  # noqa: E731
        whole = lambda: reference.topk_kl(states @ lm_head.t(), ids, logprobs, "reverse").sum()  # noqa: E731
        operations = 6 * tokens * vocabulary * hidden
        return Operation(
            name, 0, operations, lambda: torch.autograd.grad(fused(), (states, lm_head)),
            {"torch eager": lambda: torch.autograd.grad(whole(), (states, lm_head))},
        )  # fmt: skip
    student = random(tokens, vocabulary)
    if name == "overlap":
        by_topk = {"torch.topk and compare": lambda: _overlap_by_topk(student, ids)}
        return Operation(name, size, 0, lambda: topk_overlap(student, ids, TOP_K), by_topk)
    student.requires_grad_()
    if name == "topk_kl":
        return Operation(
            name, 2 * size, 0,
            lambda: _gradient(topk_kl(student, ids, logprobs, "reverse", gradient="now"), student),
            _by_torch(lambda x: reference.topk_kl(x, ids, logprobs, "reverse").sum(), student),
        )  # fmt: skip
    teacher = random(tokens, vocabulary)
    peers = _by_torch(lambda x: reference.token_kl(x, teacher, "reverse").sum(), student)
    if device == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerJSD

        jsd = LigerJSD(beta=0.5)
        logs = lambda x: torch.log_softmax(x, dim=-1)  # noqa: E731
        peers["Liger JSD"] = lambda: torch.autograd.grad(jsd(logs(student), logs(teacher)), student)
    ours = lambda: token_kl(student, teacher, "reverse", gradient="now").loss  # noqa: E731
    return Operation(name, 3 * size, 0, lambda: _gradient(ours(), student), peers)


def _overlap_by_topk(student: Tensor, ids: Tensor) -> Tensor:
    own = student.topk(TOP_K, dim=-1).indices
    return (own[:, :, None] == ids[:, None, :]).any(-1).float().mean(-1)


def _gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss.sum(), leaf)


def _by_torch(plain: Callable[[Tensor], Tensor], leaf: Tensor) -> dict[str, Callable[[], object]]:
    peers: dict[str, Callable[[], object]] = {"torch eager": lambda: torch.autograd.grad(plain(leaf), leaf)}
    if leaf.is_cuda:
        compiled = torch.compile(plain)
        peers["torch.compile"] = lambda: torch.autograd.grad(compiled(leaf), leaf)
    return peers
