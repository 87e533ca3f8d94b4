"""Qwen2.5-VL, divided among processes, computes what transformers does on one."""

from __future__ import annotations

import divided
import pytest
from tiny_qwen2_5_vl import TOKENS_PER_SECOND, config, published
from tiny_qwen3_vl import Video, conversation

BATCHES = [
    [conversation(2, 5, [4, 6], [(1, 4, 8)]), conversation(1, 9, [5, 3])],
    [conversation(6, 7, [6, 1], [(1, 10, 6), Video(3, 2, 4, 0.5)], TOKENS_PER_SECOND)],
    [conversation(7, 12, [1, 8, 2, 5])],
]


def test_two_processes_compute_what_transformers_does() -> None:
    divided.check(2, [(config(tied=True), {"tp": 2}), (config(tied=True), {"pp": 2})], BATCHES, published)


@pytest.mark.slow
def test_two_processes_divide_a_model_in_other_ways() -> None:
    cases = [
        (config(), {"tp": 2, "sequence_parallel": True}),
        (config(), {"cp": 2}),
        (config(), {"pp": 2, "vpp": 2}),
        (config(tied=True), {}),
    ]

    divided.check(2, cases, BATCHES, published)
