"""`copd_kernels.reference` against definitions written once more, in float64 and in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_kernels import reference

KINDS = ("reverse", "forward", "jsd")
SHAPES = {
    "tokens": st.integers(1, 5),
    "vocabulary": st.integers(2, 40),
    "seed": st.integers(0, 10_000),
    "scale": st.sampled_from([0.1, 1.0, 4.0, 12.0]),
}


def random_pair(tokens: int, vocabulary: int, seed: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    teacher = student + torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * min(scale, 2.0)
    return student, teacher


def top_of(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, ids = torch.log_softmax(teacher, dim=-1).topk(k, dim=-1)
    return ids, logprobs


def divergence_of_lists(p: list[float], q: list[float], kind: str, beta: float) -> float:
    def kl(a: list[float], b: list[float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if kind == "reverse":
        return kl(p, q)
    if kind == "forward":
        return kl(q, p)
    m = [beta * y + (1 - beta) * x for x, y in zip(p, q, strict=True)]
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def buckets(logits: torch.Tensor, ids: torch.Tensor) -> list[float]:
    probabilities = torch.softmax(logits.double(), dim=-1).tolist()
    top = [probabilities[i] for i in ids.tolist()]
    rest = math.fsum(p for i, p in enumerate(probabilities) if i not in set(ids.tolist()))
    return [*top, max(rest, reference.TAIL_FLOOR)]


@given(**SHAPES, k=st.integers(1, 12), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_overlap_is_the_intersection_of_stable_sorts(tokens, vocabulary, seed, scale, k, dtype):
    k = min(k, vocabulary)
    student, teacher = random_pair(tokens, vocabulary, seed, scale)
    student = student.round().to(dtype)  # many ties
    teacher_ids = teacher.round().sort(dim=-1, descending=True, stable=True).indices
    student_ids = student.sort(dim=-1, descending=True, stable=True).indices
    expected = [
        len(set(mine[:k]) & set(theirs[:k])) / k
        for mine, theirs in zip(student_ids.tolist(), teacher_ids.tolist(), strict=True)
    ]
    assert reference.topk_overlap(student, teacher_ids, k).tolist() == pytest.approx(expected)


def test_overlap_counts_only_the_first_k_of_the_teacher():
    student = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    assert reference.topk_overlap(student, torch.tensor([[4, 3, 0, 1]]), 2).item() == 0.0
    assert reference.topk_overlap(student, torch.tensor([[4, 3, 0, 1]]), 4).item() == 0.75


@pytest.mark.parametrize("k", [0, 3])
def test_overlap_of_more_than_the_teacher_gave_is_refused(k):
    with pytest.raises(ValueError, match=f"overlap@{k}"):
        reference.topk_overlap(torch.zeros(1, 5), torch.tensor([[0, 1]]), k)


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_token_kl_is_the_divergence_over_the_vocabulary(kind, tokens, vocabulary, seed, scale, dtype):
    student, teacher = (logits.to(dtype) for logits in random_pair(tokens, vocabulary, seed, scale))
    expected = [
        divergence_of_lists(torch.softmax(s, -1).tolist(), torch.softmax(t, -1).tolist(), kind, 0.3)
        for s, t in zip(student.double(), teacher.double(), strict=True)
    ]
    found = reference.token_kl(student, teacher, kind, jsd_beta=0.3)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.tolist() == pytest.approx(expected, rel=2e-5, abs=3e-6)


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES, k=st.integers(1, 12), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_topk_kl_is_the_divergence_over_top_k_and_tail(kind, tokens, vocabulary, seed, scale, k, dtype):
    student, teacher = (logits.to(dtype) for logits in random_pair(tokens, vocabulary, seed, scale))
    ids, logprobs = top_of(teacher.double(), min(k, vocabulary))
    expected = [
        divergence_of_lists(buckets(s, i), buckets(t, i), kind, 0.3)
        for s, t, i in zip(student, teacher, ids, strict=True)
    ]
    found = reference.topk_kl(student, ids, logprobs.to(reference.widen(student).dtype), kind, jsd_beta=0.3)
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES, k=st.integers(1, 12))
def test_topk_kl_lies_between_zero_and_the_whole(kind, tokens, vocabulary, seed, scale, k):
    student, teacher = random_pair(tokens, vocabulary, seed, scale)
    ids, logprobs = top_of(teacher, min(k, vocabulary))
    coarse, whole = reference.topk_kl(student, ids, logprobs, kind), reference.token_kl(student, teacher, kind)
    floor = 20 * reference.TAIL_FLOOR
    assert (coarse >= -floor).all()
    assert (coarse <= whole + floor).all()


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES)
def test_top_k_of_the_whole_vocabulary_is_exact(kind, tokens, vocabulary, seed, scale):
    student, teacher = (logits.float() for logits in random_pair(tokens, vocabulary, seed, scale))
    ids, logprobs = top_of(teacher, vocabulary)
    torch.testing.assert_close(
        reference.topk_kl(student, ids, logprobs, kind),
        reference.token_kl(student, teacher, kind),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
@given(**SHAPES, k=st.integers(1, 12), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(kind, tokens, vocabulary, seed, scale, k, dtype):
    logits = random_pair(tokens, vocabulary, seed, scale)[0].to(dtype).requires_grad_()
    ids, logprobs = top_of(logits.detach().float(), min(k, vocabulary))
    loss = reference.topk_kl(logits, ids, logprobs, kind)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.abs().max() < 3e-6
    assert gradient.abs().max() < 3e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradients_are_those_of_the_formula(kind, k):
    student, teacher = random_pair(3, 6, seed=k, scale=1.0)
    ids, logprobs = top_of(teacher, k)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: reference.topk_kl(x, ids, logprobs, kind, 0.3), student)
    assert torch.autograd.gradcheck(lambda x: reference.token_kl(x, teacher, kind, 0.3), student)


def test_gradient_of_topk_kl_is_the_documented_one():
    student, teacher = random_pair(4, 9, seed=5, scale=1.0)
    ids, logprobs = top_of(teacher, 3)
    student.requires_grad_()
    p, q = torch.softmax(student.detach(), -1), torch.softmax(teacher, -1)
    in_top = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    rest = lambda x: x.masked_fill(in_top, 0).sum(-1, keepdim=True)  # noqa: E731
    p_bucket, q_bucket = torch.where(in_top, p, rest(p)), torch.where(in_top, q, rest(q))

    reverse = reference.topk_kl(student, ids, logprobs, "reverse")
    (gradient,) = torch.autograd.grad(reverse.sum(), student)
    torch.testing.assert_close(gradient, p * ((p_bucket / q_bucket).log() - reverse.detach()[:, None]))

    forward = reference.topk_kl(student, ids, logprobs, "forward")
    (gradient,) = torch.autograd.grad(forward.sum(), student)
    torch.testing.assert_close(gradient, p * (1 - q_bucket / p_bucket))


def test_teacher_gets_no_gradient():
    student, teacher = random_pair(2, 6, seed=0, scale=1.0)
    student.requires_grad_()
    teacher.requires_grad_()
    reference.token_kl(student, teacher, "reverse").sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward"), (1.0, "reverse")])
def test_jsd_ends_in_forward_and_reverse(beta, kind):
    student, teacher = random_pair(4, 8, seed=1, scale=1.0)
    expected = reference.token_kl(student, teacher, kind)
    torch.testing.assert_close(reference.token_kl(student, teacher, "jsd", jsd_beta=beta), expected)
    # Close to an end it is the same divergence times the distance to that end.
    near = 1e-6 if beta == 0 else 1 - 1e-6
    torch.testing.assert_close(
        reference.token_kl(student, teacher, "jsd", jsd_beta=near) / 1e-6, expected, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_the_teacher_never_says_leave_everything_finite(kind):
    student = torch.zeros(1, 4, requires_grad=True)
    never = torch.tensor([[math.log(0.5), math.log(0.5), -math.inf]])
    loss = reference.topk_kl(student, torch.tensor([[0, 1, 2]]), never, kind)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_collapsed_student_keeps_finite_gradients(kind):
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], requires_grad=True)
    ids, logprobs = top_of(torch.zeros(1, 4), 2)
    loss = reference.topk_kl(student, ids, logprobs, kind)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert student.grad.abs().max() < 2


def test_small_tails_keep_their_mass():
    """A tail of 1e-5 survives float32, where 1 − Σ of rounded probabilities has lost a thousandth of it."""
    tail = 1e-5
    top = torch.tensor([[1 - tail]], dtype=torch.float64).log().float()
    assert reference.with_tail(top)[0, 1].exp().item() == pytest.approx(tail, rel=1e-4)
