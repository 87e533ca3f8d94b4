"""`copd_kernels.topk_kl` in the interpreter against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EXAMPLES, Case, assert_close, assert_gradient, cases
from hypothesis import given
from hypothesis import strategies as st

from copd_kernels import reference
from copd_kernels.topk_kl import topk_kl

pytestmark = pytest.mark.usefixtures("interpreted")

KINDS = ("reverse", "forward", "jsd")
WHEN = ("later", "now", "overwrite")


def expected_of(case: Case, ids, logprobs, kind, beta, tail):
    student = case.student.double().requires_grad_()
    loss = reference.topk_kl(student, ids, logprobs.double(), kind, beta, tail, case.temperature)
    loss = loss * case.weights.double()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def found_by(case: Case, ids, logprobs, kind, beta, tail, gradient, factor=None):
    leaf = case.student.detach().requires_grad_()
    logits = leaf * 1 if gradient == "overwrite" else leaf
    options = {"weights": case.weights, "gradient": gradient}
    loss = topk_kl(logits, ids, logprobs, kind, beta, tail, case.temperature, **options)
    (result,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if factor is None else factor)
    return loss.detach(), result


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(case=cases(), k=st.integers(1, 64), gradient=st.sampled_from(WHEN), beta=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_loss_and_gradient_are_the_reference_s(kind, tail, case, k, gradient, beta):
    ids, logprobs = case.top(min(k, case.student.shape[1]))
    expected, expected_gradient = expected_of(case, ids, logprobs, kind, beta, tail)
    loss, result = found_by(case, ids, logprobs, kind, beta, tail, gradient)
    assert_close(loss, expected, case)
    assert_gradient(result, expected_gradient, case)


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_tail_is_summed_and_not_one_minus_the_top(kind, gradient):
    """A tail of 2e-5: 1 − Σ of float32 probabilities would have lost a hundredth of it, and its gradient with it."""
    student = torch.full((1, 500), -7.0)
    student[0, ::97] = 8.0 + torch.arange(6) / 7
    student[0, 250:] -= 1.5
    teacher = student.clone()
    teacher[0, 97] += 2.0
    teacher[0, 1:90] += 7.0
    case = Case(student, teacher, torch.ones(1), 1.0)
    ids, logprobs = case.top(6)
    expected, expected_gradient = expected_of(case, ids, logprobs, kind, 0.5, "bucket")
    loss, result = found_by(case, ids, logprobs, kind, 0.5, "bucket", gradient)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    unlisted = torch.ones(500, dtype=torch.bool).index_fill(0, ids[0], False)
    mass = torch.softmax(student.double(), -1)[0, unlisted].sum()
    assert 1e-5 < mass < 1e-4
    torch.testing.assert_close(result[0, unlisted].double(), expected_gradient[0, unlisted], rtol=2e-5, atol=0)


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tail_below_the_floor_is_a_constant(kind, gradient):
    student = torch.full((1, 200), -30.0)
    student[0, :3] = torch.tensor([1.0, 2.0, 3.0])
    case = Case(student, student + torch.linspace(0, 1, 200), torch.ones(1), 1.0)
    ids, logprobs = torch.tensor([[0, 1, 2]]), torch.tensor([[0.2, 0.3, 0.4]]).log()
    expected, expected_gradient = expected_of(case, ids, logprobs, kind, 0.5, "bucket")
    loss, result = found_by(case, ids, logprobs, kind, 0.5, "bucket", gradient)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.double(), expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", WHEN)
def test_max_shift_keeps_logits_of_any_size(gradient):
    """The first tile is 400 below the rest; exponentials of neither could be taken as they are."""
    student = torch.randn(2, 300, generator=torch.Generator().manual_seed(0)) + 500
    student[:, :64] -= 400
    case = Case(student, student + 1, torch.ones(2), 1.0)
    ids, logprobs = torch.tensor([[70, 80, 299], [64, 65, 66]]), torch.tensor([[0.5, 0.2, 0.1]] * 2).log()
    expected, expected_gradient = expected_of(case, ids, logprobs, "reverse", 0.5, "bucket")
    loss, result = found_by(case, ids, logprobs, "reverse", 0.5, "bucket", gradient)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.double(), expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_nan_makes_its_own_token_s_loss_nan(tail, gradient):
    student = torch.randn(4, 150, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(5).repeat(4, 1) * 20
    student[1, 40] = math.nan
    student[3, 60] = math.inf
    case = Case(student, student, torch.tensor([1.0, 1.0, 1.0, 1.0]), 1.0)
    logprobs = torch.full((4, 5), 0.1).log()
    loss, result = found_by(case, ids, logprobs, "reverse", 0.5, tail, gradient)
    assert loss.isnan().tolist() == [False, True, False, True]
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gradient", WHEN)
def test_rows_of_weight_zero_are_not_read(gradient):
    student = torch.randn(3, 150, generator=torch.Generator().manual_seed(0))
    student[1] = math.nan
    ids = torch.tensor([[1, 2], [-5, 10_000], [3, 4]])
    case = Case(student, student, torch.tensor([1.0, 0.0, 2.0]), 1.0)
    loss, result = found_by(case, ids, torch.full((3, 2), -1.0), "forward", 0.5, "bucket", gradient)
    assert loss.isfinite().all()
    assert loss[1] == 0
    assert result[1].abs().max() == 0
    assert result.isfinite().all()


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("beyond", [-1, 150])
def test_an_id_outside_the_vocabulary_makes_its_token_s_loss_nan(beyond, gradient):
    student = torch.randn(2, 150, generator=torch.Generator().manual_seed(0))
    case = Case(student, student, torch.ones(2), 1.0)
    ids = torch.tensor([[1, 2], [3, beyond]])
    loss, _ = found_by(case, ids, torch.full((2, 2), -1.0), "reverse", 0.5, "bucket", gradient)
    assert loss.isnan().tolist() == [False, True]


@pytest.mark.parametrize("gradient", WHEN)
def test_what_arrives_from_above_multiplies_the_gradient(gradient):
    student, teacher = torch.randn(2, 3, 150, generator=torch.Generator().manual_seed(0))
    case = Case(student, teacher, torch.tensor([1.0, 0.5, 2.0]), 1.0)
    ids, logprobs = case.top(4)
    _, ones = found_by(case, ids, logprobs, "reverse", 0.5, "bucket", gradient)
    factor = torch.tensor([1.0, -3.0, 0.0])
    _, scaled = found_by(case, ids, logprobs, "reverse", 0.5, "bucket", gradient, factor)
    torch.testing.assert_close(scaled, ones * factor[:, None])


@pytest.mark.parametrize("gradient", WHEN)
def test_small_arguments_may_lie_anywhere(gradient):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 150, generator=generator)
    case = Case(student, teacher, torch.tensor([1.0, 9.0, 2.0, 9.0, 0.5, 9.0])[::2], 1.0)
    ids, logprobs = (values.t().contiguous().t() for values in case.top(4))
    assert not ids.is_contiguous()
    expected, expected_gradient = expected_of(case, ids, logprobs, "reverse", 0.5, "bucket")
    loss, result = found_by(case, ids, logprobs, "reverse", 0.5, "bucket", gradient)
    assert_close(loss, expected, case)
    assert_gradient(result, expected_gradient, case)


@pytest.mark.parametrize("gradient", ["now", "overwrite"])
def test_a_gradient_formed_with_the_loss_is_used_once(gradient):
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    used = logits * 1
    loss = topk_kl(used, torch.tensor([[1, 2]] * 2), torch.full((2, 2), -1.0), "reverse", gradient=gradient).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the first backward pass"):
        loss.backward()


def test_whoever_kept_overwritten_logits_is_told():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    used = logits * 1
    other = used.square().sum()
    loss = topk_kl(used, torch.tensor([[1, 2]] * 2), torch.full((2, 2), -1.0), "reverse", gradient="overwrite")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss.sum() + other).backward()
