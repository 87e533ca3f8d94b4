"""`copd_kernels.topk` in the interpreter against stable sorts: exactly the same sets, in the same order."""

from __future__ import annotations

import math

import pytest
import torch
from cases import EXAMPLES, FORMATS
from hypothesis import given, settings
from hypothesis import strategies as st

from copd_kernels import reference
from copd_kernels.device import launch
from copd_kernels.device import topk as device
from copd_kernels.topk import topk, topk_and_overlap, topk_overlap

pytestmark = pytest.mark.usefixtures("interpreted")


def rows_of_every_kind(size: int, dtype: torch.dtype, seed: int, steps: float) -> torch.Tensor:
    """Random, rounded to few values, all equal, two values, both zeros, mostly −∞, with +∞, ascending."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, size, generator=generator) * 3
    x[1] = (x[1] * steps).round() / steps
    x[2] = 1.5
    x[3] = (x[3] > 0).float()
    x[4] = torch.where(x[4] > 0, 0.0, -0.0)
    x[5, torch.randperm(size, generator=generator)[: size - size // 3]] = -math.inf
    x[6, torch.randint(size, (1,), generator=generator)] = math.inf
    x[7] = torch.arange(size) / size
    return x.to(dtype)


@settings(EXAMPLES, max_examples=10)
@given(
    size=st.integers(1, 400),
    k=st.integers(1, 128),
    dtype=st.sampled_from(FORMATS),
    seed=st.integers(0, 10_000),
    steps=st.sampled_from([0.5, 2.0, 8.0]),
)
def test_top_k_and_overlap_are_those_of_stable_sorts(size, k, dtype, seed, steps):
    k = min(k, size)
    student, teacher = (rows_of_every_kind(size, dtype, seed + side, steps) for side in (0, 1))
    teacher = (student.float() + 0.5 * teacher.float()).nan_to_num(0.0)
    teacher_ids = teacher.topk(k).indices
    expected = student.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    found, share = topk_and_overlap(student, teacher_ids, k)
    assert torch.equal(found.ids, expected)
    assert torch.equal(share, reference.topk_overlap(student, teacher_ids, k))
    assert torch.equal(topk_overlap(student, teacher_ids, k), share)
    logprobs = torch.log_softmax(student.double(), dim=-1).gather(-1, expected)
    usual = logprobs.isfinite().all(-1)
    torch.testing.assert_close(found.logprobs[usual].double(), logprobs[usual], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", FORMATS)
def test_tie_rule_the_lower_id_ranks_first_across_and_within_blocks(dtype):
    """Five above, and ties in three blocks of 128 lanes: what is missing comes from the lowest ids."""
    student = torch.zeros(1, 400, dtype=dtype)
    student[0, [399, 300, 200, 100, 50]] = 2.0
    ties = [7, 9, 120, 130, 140, 260, 398]
    student[0, ties] = 1.0
    for k in range(5, 13):
        expected = [50, 100, 200, 300, 399, *ties][:k]
        assert topk(student, k).ids.tolist() == [expected]
        assert topk_overlap(student, torch.tensor([ties]), min(k, 7)).item() == pytest.approx(
            max(0, min(k, 7) - 5) / min(k, 7)
        )


@pytest.mark.parametrize("dtype", FORMATS)
def test_tie_rule_zeros_of_both_signs_are_equal(dtype):
    student = torch.full((1, 300), -1.0, dtype=dtype)
    student[0, [20, 150, 280]] = torch.tensor([-0.0, 0.0, -0.0], dtype=dtype)
    assert topk(student, 2).ids.tolist() == [[20, 150]]
    assert topk_overlap(student, torch.tensor([[20, 280]]), 2).item() == 0.5


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_that_the_fast_path_cannot_certify_take_the_exact_one(dtype, monkeypatch):
    """The best ten are in one lane of 128, which keeps two."""
    counted = []
    count_row = device.count_row
    monkeypatch.setattr(device, "count_row", lambda *arguments: counted.append(1) or count_row(*arguments))
    student = torch.randn(1, 1500, generator=torch.Generator().manual_seed(0))
    assert topk(student.to(dtype), 2).ids.tolist() == student.to(dtype).topk(2).indices.tolist()
    certified = len(counted)
    best = torch.arange(5, 1500, 128)[:10]
    student[0, best] = 10.0 + torch.arange(10) / 4
    found = topk(student.to(dtype), 8)
    assert len(counted) > certified == 0
    assert found.ids.tolist() == [best.flip(0)[:8].tolist()]
    assert topk_overlap(student.to(dtype), best[None], 8).item() == pytest.approx(0.75)


@pytest.mark.parametrize("dtype", FORMATS)
def test_nan_is_known_in_its_row_alone(dtype):
    student = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    ids = student.float().topk(4).indices
    student[1, 77] = math.nan
    share = topk_overlap(student, ids, 4)
    assert share.isnan().tolist() == [False, True, False]
    assert share[0] == share[2] == 1
    top = topk(student, 4)
    assert top.logsumexp.isnan().tolist() == [False, True, False]
    assert top.ids[1, 0] == 77
    assert torch.equal(reference.topk_overlap(student, ids, 4).isnan(), share.isnan())


def test_a_teacher_may_be_given_by_its_logits():
    student, teacher = torch.randn(2, 4, 200, generator=torch.Generator().manual_seed(0)).round()
    expected = reference.topk_overlap(student, teacher, 9)
    assert 0 < expected.sum() < 4
    assert torch.equal(topk_overlap(student, teacher, 9), expected)
    teacher[2, 5] = math.nan
    assert topk_overlap(student, teacher, 9).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("width", [197, 208])
def test_rows_may_be_chosen_and_lie_anywhere(width):
    wide = torch.randn(6, width + 11, generator=torch.Generator().manual_seed(0)).bfloat16()
    student, rows = wide[:, 3 : width + 3], torch.tensor([5, 0, 5, 2])
    ids = student[rows].float().topk(7).indices.roll(1, 0)
    expected = reference.topk_overlap(student[rows], ids, 7)
    assert torch.equal(topk_overlap(student, ids, 7, rows=rows), expected)
    assert torch.equal(topk(student, 7, rows=rows).ids, reference.topk(student[rows], 7)[0])
    across = student.t().contiguous().t()  # columns apart, rows together
    assert torch.equal(topk_overlap(across, ids, 7, rows=rows), expected)


def test_ids_outside_the_vocabulary_are_in_nobody_s_top():
    student = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    best = student.topk(2).indices
    assert topk_overlap(student, torch.cat([best, torch.tensor([[-1, 50]])], dim=-1), 4).item() == 0.5


def test_no_tokens_are_allowed():
    top, share = topk_and_overlap(torch.zeros(0, 40), torch.zeros(0, 5, dtype=torch.int64), 5)
    assert top.ids.shape == top.logprobs.shape == (0, 5)
    assert share.shape == (0,)


def test_a_row_may_be_scaled_far_beyond_its_first_tile():
    student = torch.zeros(1, 400)
    student[0, 390] = 300.0
    student[0, 391] = 299.0
    top = topk(student, 2, temperature=0.5)
    assert top.logprobs[0].tolist() == pytest.approx([-0.126928, -2.126928], abs=1e-5)
    assert top.logsumexp.item() == pytest.approx(600.126928)


def test_shipped_lanes_hold_twice_the_largest_k():
    assert min(launch.LANES.values()) >= 128
