"""Output layer and divergence by chunks: what the whole gives, without ever making the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from copd_kernels import reference
from copd_kernels.choice import VARIABLE
from copd_kernels.linear_token_kl import Head, Logits, TopK, linear_token_kl

sys.path.append(str(Path(__file__).parents[1] / "objectives"))
from memory import Outputs

TOKENS, VOCABULARY, HIDDEN, K = 7, 90, 8, 6
KINDS = ("reverse", "forward", "jsd")


def inputs(dtype: torch.dtype, teacher: str):
    """Hidden states, output layer, weights, teacher, and the function of the logits that the loss is."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    hidden, lm_head = random(TOKENS, HIDDEN).requires_grad_(), random(VOCABULARY, HIDDEN).requires_grad_()
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 0.25])
    head = Head(random(TOKENS, 5), random(VOCABULARY, 5))
    logits = head.hidden @ head.lm_head.t()
    if teacher == "top-k":
        logprobs, ids = torch.log_softmax(reference.widen(logits) / 0.7, dim=-1).topk(K)
        of = lambda x, kind: reference.topk_kl(x, ids, logprobs, kind, 0.3, "bucket", 0.7)  # noqa: E731
        return hidden, lm_head, weights, TopK(ids, logprobs), of
    of = lambda x, kind: reference.token_kl(x, logits, kind, 0.3, 0.7)  # noqa: E731
    return hidden, lm_head, weights, head if teacher == "head" else Logits(logits), of


@pytest.mark.parametrize("run", ["reference", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["top-k", "logits", "head"])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_give_what_the_whole_gives(chunk, teacher, kind, run, monkeypatch, request):
    if run == "triton":
        request.getfixturevalue("interpreted")
    dtype = torch.float64 if run == "reference" else torch.float32
    hidden, lm_head, weights, given, of = inputs(dtype, teacher)
    expected = of(hidden @ lm_head.t(), kind) * weights
    gradients = torch.autograd.grad(3 * expected.sum(), (hidden, lm_head))
    found = linear_token_kl(hidden, lm_head, given, kind, 0.3, "bucket", 0.7, weights=weights, chunk=chunk)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if run == "reference" else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(found.loss, expected.detach(), **tolerance)
    torch.testing.assert_close(found.total, expected.detach().sum(), **tolerance)
    torch.testing.assert_close(torch.autograd.grad(3 * found.total, (hidden, lm_head)), gradients, **tolerance)


@pytest.mark.parametrize("needed", ["hidden", "lm_head", "neither"])
def test_only_gradients_that_are_required_are_formed(needed):
    hidden, lm_head, _, given, of = inputs(torch.float64, "top-k")
    whole = of(hidden @ lm_head.t(), "forward").sum()
    gradients = dict(zip(("hidden", "lm_head"), torch.autograd.grad(whole, (hidden, lm_head)), strict=True))
    arguments = {"hidden": hidden.detach(), "lm_head": lm_head.detach()}
    if needed == "neither":
        found = linear_token_kl(**arguments, teacher=given, kind="forward", chunk=3)
        assert not found.total.requires_grad
    else:
        arguments[needed].requires_grad_()
        found = linear_token_kl(**arguments, teacher=given, kind="forward", chunk=3, temperature=0.7)
        torch.testing.assert_close(torch.autograd.grad(found.total, arguments[needed])[0], gradients[needed])


@pytest.mark.parametrize("teacher", ["top-k", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_of_logits_or_the_results(dtype, teacher, monkeypatch):
    monkeypatch.setenv(VARIABLE, "reference")
    generator = torch.Generator().manual_seed(0)
    tokens, vocabulary, width, chunk = 96, 500, 4, 8
    random = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    hidden, lm_head = random(tokens, width).requires_grad_(), random(vocabulary, width).requires_grad_()
    ids = torch.randn(tokens, vocabulary, generator=generator).topk(5).indices
    head = Head(random(tokens, width), random(vocabulary, width))
    given = TopK(ids, torch.full(ids.shape, -3.0)) if teacher == "top-k" else head
    with Outputs() as outputs:
        found = linear_token_kl(hidden, lm_head, given, "reverse", chunk=chunk)
        found.total.backward()
    largest = max(outputs.elements.values())
    assert largest == chunk * vocabulary
    assert largest < tokens * vocabulary / 10
    assert hidden.grad.dtype == lm_head.grad.dtype == dtype


def test_bfloat16_weight_gradients_are_added_up_in_float32():
    """1,000 summands of 0.4 in bfloat16 would stop growing at 128."""
    hidden = torch.ones(1000, 1, dtype=torch.bfloat16)
    lm_head = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    teacher = TopK(torch.zeros(1000, 1, dtype=torch.int64), torch.full((1000, 1), 0.9).log())
    linear_token_kl(hidden, lm_head, teacher, "forward", chunk=1).total.backward()
    assert lm_head.grad[0].item() == pytest.approx(-1000 * 0.4, rel=0.01)


def test_the_backward_pass_runs_once():
    hidden, lm_head, _, given, _ = inputs(torch.float64, "top-k")
    total = linear_token_kl(hidden, lm_head, given, "reverse").total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward pass"):
        total.backward()


def test_no_tokens_are_allowed():
    hidden, lm_head = torch.zeros(0, 3, requires_grad=True), torch.zeros(5, 3, requires_grad=True)
    found = linear_token_kl(hidden, lm_head, Logits(torch.zeros(0, 5)), "reverse")
    found.total.backward()
    assert found.total == 0
    assert lm_head.grad.abs().max() == 0
