"""Experts spread over processes compute what transformers does on one."""

from __future__ import annotations

from typing import Any

import divided
import pytest
import torch
from tiny_qwen3_vl import Video, conversation, moe_config

CONVERSATIONS = [
    [conversation(2, 5, [4, 6], [(1, 4, 8)]), conversation(1, 9, [5, 3])],
    [conversation(6, 7, [6, 1], [(1, 4, 8), Video(3, 2, 2)])],
    [conversation(7, 12, [1, 8, 2, 5])],
]
"""Three micro-batches: with two replicas or more some have fewer to do than others."""

TWO: list[dict[str, Any]] = [{"ep": 2}, {"tp": 2, "sequence_parallel": True}]
FOUR: list[dict[str, Any]] = [
    {"tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True},
    {"pp": 2, "vpp": 2, "ep": 2},
    {"cp": 2, "ep": 2, "etp": 2},
]


def published(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Qwen publishes the matrices of experts the other way round."""
    return {name: tensor.transpose(1, 2) if ".experts." in name else tensor for name, tensor in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("world", "layouts"), [(2, TWO), (4, FOUR)], ids=["two", "four"])
def test_processes_compute_what_transformers_does(world: int, layouts: list[dict[str, Any]]) -> None:
    divided.check(world, [(moe_config(dense=[1]), degrees) for degrees in layouts], CONVERSATIONS, published)
