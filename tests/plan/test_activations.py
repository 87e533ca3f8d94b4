"""What the plan says a micro-batch keeps, beside torch's own count of a real forward and backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_qwen3_vl as tiny
import torch

from copd_megatron.plan.check import compare
from copd_megatron.plan.shards import playing
from copd_megatron.policy.context import Stripe, share
from copd_megatron.policy.degrees import Layout
from copd_megatron.policy.qwen3_vl import build_model

TOLERANCE = 0.10

SHAPES: dict[str, list[tuple[int, list[int], list[tuple[int, int, int]]]]] = {
    "one response": [(40, [300], [])],
    "groups": [(40, [300, 280, 250, 90], []), (200, [130, 400, 80], [])],
    "images": [(40, [300, 200], [(1, 8, 8)]), (64, [100, 200], [(1, 12, 16)])],
    "long prompt": [(700, [60, 80], [(1, 32, 48)])],
}
LARGE = {"many responses": [(100, [500] * 4, []), (300, [400] * 3, [])], "one prompt": [(500, [600] * 3, [])]}


def batch_of(shape: list[tuple[int, list[int], list[tuple[int, int, int]]]]) -> Any:
    conversations = [tiny.conversation(seed, *case) for seed, case in enumerate(shape)]
    return tiny.pack(conversations)


def model_of(kind: str, layout: Layout, precision: Any, recompute: Any, vocab: int = tiny.VOCAB) -> Any:
    hf = tiny.moe_config() if kind == "experts" else tiny.config(vocab=vocab)
    return build_model(hf, layout, precision, recompute)[0].train()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_kept_bytes_are_what_autograd_saves(kind: str, recompute: Any) -> None:
    with tiny.alone() as layout:
        model = model_of(kind, layout, "bf16", recompute)
        for name, shape in SHAPES.items():
            found = compare(model, batch_of(shape), layout, recompute, backward=False)
            assert found.kept_planned == pytest.approx(found.kept_measured, rel=TOLERANCE), name


@pytest.mark.parametrize(("kind", "recompute"), [("dense", "none"), ("experts", "selective"), ("experts", "full")])
def test_peak_is_that_of_a_forward_and_backward_pass(kind: str, recompute: Any) -> None:
    with tiny.alone() as layout:
        # A vocabulary whose logits count; much larger ones would only measure the logits.
        model = model_of(kind, layout, "bf16", recompute, vocab=2001)
        for name, shape in LARGE.items():
            found = compare(model, batch_of(shape), layout, recompute)
            assert found.peak_planned == pytest.approx(found.peak_measured, rel=TOLERANCE), name


@pytest.mark.parametrize(
    "layout",
    [
        Layout(world=2, tp=2),
        Layout(world=2, tp=2, sequence_parallel=True),
        Layout(world=2, cp=2),
        Layout(world=4, tp=2, cp=2, sequence_parallel=True),
    ],
    ids=["tp", "tp sp", "cp", "tp cp sp"],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_ranks_of_a_layout_keep_their_share(layout: Layout, recompute: Any) -> None:
    with playing(0, layout):
        model = model_of("dense", layout, "fp32", recompute)
        multiple = layout.tp if layout.sequence_parallel else 1
        batch = share(batch_of(SHAPES["groups"]), Stripe(0, layout.cp), multiple)
        found = compare(model, batch, layout, recompute, backward=False)
    assert found.kept_planned == pytest.approx(found.kept_measured, rel=TOLERANCE)


def test_a_mask_is_kept_by_every_layer_that_recomputes_nothing() -> None:
    """Squares of tokens: what makes long responses dear without recomputation."""
    batch = batch_of([(100, [800, 800], [])])
    with tiny.alone() as layout:
        whole, without = (
            compare(model_of("dense", layout, "fp32", recompute), batch, layout, recompute, backward=False)
            for recompute in ("none", "selective")
        )
    layers, mask = 4, 2 * 799 * 899
    assert whole.kept_measured - without.kept_measured > layers * mask * 4


def test_no_memory_is_counted_twice() -> None:
    from copd_megatron.plan.measure import kept_bytes

    weight = torch.ones(100, requires_grad=True)

    def run() -> torch.Tensor:
        doubled = weight * 2
        return (doubled.sin() * doubled.view(10, 10).flatten().cos()).sum()

    counted, _ = kept_bytes(run, [weight])
    assert counted == 4 * 100 * 3  # doubled, its sine and its cosine
