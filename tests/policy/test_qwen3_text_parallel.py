"""Models that take text alone, divided among processes, compute what transformers does on one."""

from __future__ import annotations

import divided
import pytest
from tiny_qwen3_text import dense, published, sparse
from tiny_qwen3_vl import conversation

BATCHES = [
    [conversation(2, 6, [4, 6]), conversation(1, 9, [5, 3])],
    [conversation(6, 7, [6, 1])],
    [conversation(7, 12, [1, 8, 2, 5])],
]
SEQUENCE = {"tp": 2, "sequence_parallel": True}


def test_two_processes_compute_what_transformers_does() -> None:
    cases = [(dense(), {"tp": 2}), (dense(), {"pp": 2}), (sparse([1]), SEQUENCE), (sparse([1]), {"pp": 2})]

    divided.check(2, cases, BATCHES, published)


@pytest.mark.slow
def test_two_processes_divide_a_model_in_other_ways() -> None:
    untied = dense(tied=False)
    cases = [(dense(), SEQUENCE), (untied, SEQUENCE), (untied, {"pp": 2}), (dense(), {"cp": 2}), (sparse(), {"ep": 2})]

    divided.check(2, cases, BATCHES, published)


@pytest.mark.slow
def test_four_processes_divide_experts() -> None:
    cases = [(sparse([1]), {"pp": 2, "vpp": 2, "ep": 2}), (sparse([1]), {**SEQUENCE, "ep": 2, "etp": 1})]

    divided.check(4, cases, BATCHES, published)
