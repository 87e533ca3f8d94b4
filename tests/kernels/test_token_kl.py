"""`copd_kernels.token_kl` in the interpreter against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EXAMPLES, Case, assert_close, assert_gradient, cases
from hypothesis import given
from hypothesis import strategies as st

from copd_kernels import reference
from copd_kernels.token_kl import token_kl

pytestmark = pytest.mark.usefixtures("interpreted")

KINDS = ("reverse", "forward", "jsd")
WHEN = ("later", "now", "overwrite")


def expected_of(case: Case, kind: str, beta: float):
    student = case.student.double().requires_grad_()
    loss = reference.token_kl(student, case.teacher.double(), kind, beta, case.temperature) * case.weights.double()
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def found_by(case: Case, kind: str, beta: float, gradient: str, targets=None):
    leaf = case.student.detach().requires_grad_()
    logits = leaf * 1 if gradient == "overwrite" else leaf
    options = {"weights": case.weights, "gradient": gradient, "targets": targets}
    found = token_kl(logits, case.teacher, kind, beta, case.temperature, **options)
    (result,) = torch.autograd.grad(found.loss.sum(), leaf)
    return found, result


@pytest.mark.parametrize("kind", KINDS)
@EXAMPLES
@given(case=cases(), gradient=st.sampled_from(WHEN), beta=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_loss_gradient_entropy_and_logprob_are_the_reference_s(kind, case, gradient, beta):
    expected, expected_gradient = expected_of(case, kind, beta)
    targets = case.student.float().argmax(-1) if len(case.student) else torch.zeros(0, dtype=torch.int64)
    found, result = found_by(case, kind, beta, gradient, targets)
    assert_close(found.loss.detach(), expected, case)
    assert_gradient(result, expected_gradient, case)
    logprob, entropy, _ = reference.logprobs_at(case.student.double(), targets[:, None], case.temperature)
    read = case.weights > 0
    assert_close(found.entropy, entropy * read, case)
    assert_close(found.logprob, logprob[:, 0] * read, case)


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_max_shift_keeps_logits_of_any_size(kind, gradient):
    """The first tile is 400 below the rest, on one side or on both; exponentials could not be taken as they are."""
    noise = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0))
    student, teacher = noise[0] + 500, noise[1] - 500
    student[:2, :64] -= 400
    teacher[1:, :64] -= 400
    case = Case(student, teacher, torch.ones(3), 1.0)
    expected, expected_gradient = expected_of(case, kind, 0.5)
    found, result = found_by(case, kind, 0.5, gradient)
    torch.testing.assert_close(found.loss.detach().double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result.double(), expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_small_divergences_keep_their_digits(kind):
    """Sums of s − t would lose them: 1e-4 is the difference of numbers near 10."""
    student = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0)) * 2
    teacher = student + 0.02 * torch.randn(3, 1500, generator=torch.Generator().manual_seed(1))
    case = Case(student, teacher, torch.ones(3), 1.0)
    expected, _ = expected_of(case, kind, 0.5)
    assert expected.max() < 3e-4
    torch.testing.assert_close(found_by(case, kind, 0.5, "now")[0].loss.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("kind", KINDS)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(kind, gradient):
    student = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 4
    student[:, 5] = -math.inf
    found, result = found_by(Case(student, student.clone(), torch.ones(3), 0.7), kind, 0.5, gradient)
    assert found.loss.abs().max() < 2e-6
    assert result.abs().max() < 2e-6


@pytest.mark.parametrize("gradient", WHEN)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_is_flagged_for_its_own_token(side, bad, kind, gradient):
    student, teacher = torch.randn(2, 3, 150, generator=torch.Generator().manual_seed(0))
    (student if side == "student" else teacher)[1, 77] = bad
    found, result = found_by(Case(student, teacher, torch.ones(3), 1.0), kind, 0.5, gradient)
    assert found.flagged.tolist() == [False, True, False]
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gradient", WHEN)
def test_rows_of_weight_zero_are_not_read(gradient):
    student, teacher = torch.randn(2, 3, 150, generator=torch.Generator().manual_seed(0))
    student[1] = math.nan
    found, result = found_by(Case(student, teacher, torch.tensor([1.0, 0.0, 2.0]), 1.0), "jsd", 0.5, gradient)
    assert not found.flagged.any()
    assert found.loss[1] == found.entropy[1] == found.logprob[1] == 0
    assert result[1].abs().max() == 0
    assert result.isfinite().all()


@pytest.mark.parametrize("gradient", WHEN)
def test_rows_and_columns_may_lie_anywhere(gradient):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(150, 3, generator=generator).t()
    teacher = torch.randn(3, 200, generator=generator)[:, 7:157]
    case = Case(student, teacher, torch.ones(3), 1.0)
    expected, expected_gradient = expected_of(case, "reverse", 0.5)
    found, result = found_by(case, "reverse", 0.5, gradient)
    assert_close(found.loss.detach(), expected, case)
    assert_gradient(result, expected_gradient, case)


def test_overwriting_leaves_the_gradient_in_the_logits():
    logits = torch.randn(2, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    used = logits * 1
    place = used.data_ptr()
    loss = token_kl(used, torch.zeros(2, 100), "reverse", gradient="overwrite").loss.sum()
    (result,) = torch.autograd.grad(loss, used)
    assert result.data_ptr() == place
