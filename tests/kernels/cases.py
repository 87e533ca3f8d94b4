"""Random logits with everything in them that kernels get wrong, and how close a result has to be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FORMATS = (torch.float32, torch.bfloat16, torch.float16)
EXAMPLES: Any = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
"""The interpreter takes about a tenth of a second per example."""


@dataclass(frozen=True)
class Case:
    """Logits of both sides [T, V], which may be rows of something wider, weights [T] of which some are 0."""

    student: torch.Tensor
    teacher: torch.Tensor
    weights: torch.Tensor
    temperature: float

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's likeliest ids int64 [T, k] and their log-probabilities float32 [T, k]."""
        logprobs, ids = torch.log_softmax(self.teacher.double() / self.temperature, dim=-1).topk(k, dim=-1)
        return ids, logprobs.float()


@st.composite
def cases(draw: st.DrawFn, vocabulary: st.SearchStrategy[int] | None = None) -> Case:
    tokens = draw(st.integers(0, 3))
    size = draw(st.integers(2, 200) if vocabulary is None else vocabulary)
    dtype = draw(st.sampled_from(FORMATS))
    scale = draw(st.sampled_from([0.1, 1.0, 4.0, 12.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    padding = draw(st.sampled_from([0, 3, 8]))
    student = random(tokens, size + padding)[:, :size]
    teacher = student + random(tokens, size) * min(1.0, 2 / scale)
    if draw(st.booleans()):  # the first tile says little about the row's largest
        student[:, size // 2 :] += 300 * (dtype != torch.float16)
        teacher[:, size // 2 :] += 300 * (dtype != torch.float16)
    masked = draw(st.sampled_from(["none", "both", "student", "teacher"]))
    if masked != "none":
        never = torch.randint(size - 1, (max(1, size // 8),), generator=generator)
        for side in (student, teacher):
            if masked == "both" or (masked == "student") == (side is student):
                side[:, never] = -math.inf
    weights = torch.tensor([0.0, 1.0, 0.25])[torch.randint(3, (tokens,), generator=generator)]
    temperature = draw(st.sampled_from([1.0, 0.7, 2.0]))
    rows = student.new_zeros(tokens, size + padding)
    rows[:, :size] = student
    return Case(rows.to(dtype)[:, :size], teacher.to(dtype), weights, temperature)


def assert_close(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    """1e-5 relative; absolute, what float32 makes of logits at the temperature: their last place, times a few."""
    finite = torch.cat([side[side.isfinite()].flatten().float() for side in (case.student, case.teacher)])
    largest = finite.abs().max().item() / case.temperature if finite.numel() else 0.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6 + 2e-7 * largest)


def assert_gradient(found: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    """float32: 1e-5 of the row's gradient; the narrow formats: the last place, of which rounding may take another."""
    assert found.dtype == case.student.dtype
    assert found.shape == expected.shape
    if found.dtype != torch.float32:
        place = 2.0**-7 if found.dtype == torch.bfloat16 else 2.0**-10
        torch.testing.assert_close(found.double(), expected, rtol=place, atol=2e-6)
        return
    finite = case.student[case.student.isfinite()].abs()
    largest = finite.max().item() / case.temperature if finite.numel() else 0.0
    error = (found.double() - expected).norm(dim=-1)
    assert (error <= (1e-5 + 1e-6 * largest / 10) * expected.norm(dim=-1) + 1e-6 * (1 + largest / 10)).all(), error
