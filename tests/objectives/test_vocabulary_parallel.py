"""The vocabulary in parts on one, two and three ranks: losses, gradients and statistics are those of the whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batches import Batch, build, in_format, logprobs_of, random_batch, sharp_batch
from memory import Outputs

from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.distill import FULL_LOSSES, OPD_LOSSES
from copd_megatron.objectives.drift import drift_stats
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.objectives.supervised import supervised_loss
from copd_megatron.objectives.token_stats import TokenStats, token_stats
from copd_megatron.objectives.vocabulary import Vocabulary, greedy, ranks_of, token_logprobs

sys.path.append(str(Path(__file__).parents[1] / "policy"))
import gang

SETTINGS = LossSettings(overlap_k=3, teachers=2, two_sided_mask=(0.2, 8.0))
PARTS = [(11,), (7, 4), (11, 0), (4, 4, 3), (6, 5, 0), (1, 9, 1), (11, 0, 0)]
"""Columns of each rank."""
WIDE, WIDE_ROWS = (250, 200, 150), 24

Results = dict[str, torch.Tensor]


def moved_on() -> Batch:
    """A second update on the batch, with an engine that differs: clipping and importance weights act."""
    batch = random_batch(temperature=0.7)
    noise = torch.randn(2, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64) * 0.3
    current = logprobs_of(batch.logits, batch.targets, 0.7)
    return batch.but(old_logprobs=current + noise[0], engine_logprobs=current + noise[1])


def top_on_one_rank(first: int) -> Batch:
    """Every teacher's top-k and every target are among `first` … `first` + 2."""
    batch = random_batch()
    favoured = torch.zeros(11, dtype=torch.float64).index_fill(0, torch.arange(first, first + 3), 20.0)
    teacher_logits = batch.teacher_logits + favoured
    return build(batch.logits, teacher_logits, batch.targets % 3 + first, batch.signals.source, k=3)


def ties() -> Batch:
    batch = random_batch()
    return build(batch.logits.detach().div(2).round(), batch.teacher_logits, batch.targets, batch.signals.source, k=4)


def all_equal() -> Batch:
    batch = random_batch()
    return build(torch.zeros_like(batch.logits), batch.teacher_logits, batch.targets, batch.signals.source, k=4)


def far_apart() -> Batch:
    """One column holds all the mass, where softmax without the peak taken off would overflow."""
    batch = random_batch()
    logits = batch.logits.detach() + torch.nn.functional.one_hot(batch.targets.roll(1), 11) * 800.0
    return build(logits, batch.teacher_logits, batch.targets, batch.signals.source, k=4)


def masked() -> Batch:
    batch = random_batch()
    weight = batch.signals.weight.index_fill(0, torch.tensor([1, 2, 6]), 0.0)
    return batch.but(weight=weight)


BATCHES: dict[str, Callable[[], Batch]] = {
    "plain": random_batch,
    "moved on": moved_on,
    "top-k on the first rank": lambda: top_on_one_rank(0),
    "top-k on the last rank": lambda: top_on_one_rank(8),
    "ties": ties,
    "all equal": all_equal,
    "far apart": far_apart,
    "masked": masked,
    "nothing scored": lambda: random_batch(teachers=0).but(
        teacher_logprobs=None, teacher_top_ids=None, teacher_top_logprobs=None
    ),
    "empty": lambda: random_batch().rows(torch.zeros(0, dtype=torch.int64)),
    "float32": lambda: in_format(random_batch(), torch.float32),
    "float32 ties": lambda: in_format(ties(), torch.float32),
    "float32 small tails": lambda: sharp_batch(1e-5, vocabulary=11),
    "bfloat16": lambda: in_format(random_batch(), torch.bfloat16),
}


def objectives(batch: Batch, vocabulary: Vocabulary | None) -> Iterator[tuple[str, Results]]:
    """Every objective's value, statistics and gradient, and every number they are made of."""
    arguments = (batch.targets, batch.signals, vocabulary)
    temperature = 0.7
    for name in (*OPD_LOSSES, *FULL_LOSSES):
        if name == "sampled" or batch.signals.teacher_top_ids is not None:
            settings = replace(SETTINGS, opd_loss=name, temperature=temperature)
            yield name, with_gradient(batch.logits, *branch_loss(batch.logits, *arguments, settings=settings))
    yield "supervised", with_gradient(batch.logits, *supervised_loss(batch.logits, *arguments))
    yield "drift", drift_stats(batch.logits, *arguments, settings=SETTINGS)
    top_ids = batch.signals.teacher_top_ids
    stats = token_stats(batch.logits, batch.targets, temperature, top_ids, vocabulary)
    named = {field.name: getattr(stats, field.name).detach() for field in fields(stats) if field.name != "tail"}
    named["tail"] = tail_of(stats).detach()
    loss = stats.logprob.sum() + stats.top_logprobs.square().sum() + tail_of(stats).sum() / 12
    yield "token stats", {**with_gradient(batch.logits, loss, {}), **named}
    yield (
        "choices",
        {
            "token_logprobs": token_logprobs(batch.logits, batch.targets, temperature, vocabulary).detach(),
            "greedy": greedy(batch.logits, vocabulary),
            "ranks": ranks_of(batch.logits, batch.targets[:, None], vocabulary),
        },
    )


def tail_of(stats: TokenStats) -> torch.Tensor:
    """The tail [R] where it has any mass and there is a top-k."""
    tail = stats.tail if stats.top_logprobs.shape[1] else stats.logprob
    return tail.masked_fill(tail < -40, 0.0)


def with_gradient(logits: torch.Tensor, loss: torch.Tensor, stats: Results) -> Results:
    (gradient,) = torch.autograd.grad(loss, logits)
    return {**stats, "loss": loss.detach(), "gradient": gradient}


def parts_of(widths: tuple[int, ...], group: dist.ProcessGroup) -> tuple[Vocabulary, slice]:
    """This rank's part of a vocabulary, and its columns."""
    ends = list(accumulate(widths))
    start = ends[group.rank()] - widths[group.rank()]
    return Vocabulary(start, ends[-1], group), slice(start, ends[group.rank()])


def slice_of(batch: Batch, columns: slice) -> Batch:
    own = batch.but(teacher_logits=lambda: batch.signals.teacher_logits()[:, columns])
    return replace(own, logits=batch.logits.detach()[:, columns].requires_grad_())


def evaluate_parts() -> dict[Any, Any]:
    """What this rank gets, by parts, batch and objective; and what it allocated."""
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(range(size)) for size in (1, 2, 3)}
    results: dict[Any, Any] = {}
    for widths in PARTS:
        if dist.get_rank() < len(widths):
            vocabulary, columns = parts_of(widths, groups[len(widths)])
            for name, make in BATCHES.items():
                for objective, values in objectives(slice_of(make(), columns), vocabulary):
                    results[widths, name, objective] = values
    for widths in (WIDE, (300, 300, 0)):
        vocabulary, columns = parts_of(widths, groups[3])
        batch = slice_of(random_batch(WIDE_ROWS, sum(widths)), columns)
        with Outputs() as outputs:
            list(objectives(batch, vocabulary))
        results[widths, "elements"] = dict(outputs.elements)
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """Each rank's `evaluate_parts`."""
    return gang.run(3, evaluate_parts)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("widths", PARTS, ids=str)
def test_parts_give_what_the_whole_gives(ranks, widths, name):
    single = "float" in name
    for objective, expected in objectives(BATCHES[name](), None):
        columns = expected.get("gradient", torch.zeros(0, 11)).split(widths, dim=1)
        for rank, columns_of_rank in enumerate(columns):
            found = ranks[rank][widths, name, objective]
            assert set(found) == set(expected)
            for key, value in expected.items():
                value = columns_of_rank if key == "gradient" else value
                assert found[key].dtype == value.dtype
                if value.dtype == torch.bfloat16:  # float32 numbers that differ in the last bit may round to neighbours
                    rtol, atol = 2**-7, 1e-6
                elif "/" in key and single:  # sums over tokens of what depends on small tails
                    rtol, atol = 1e-5, 1e-5
                else:
                    rtol = atol = 1e-6 if single else 1e-12
                where = f"{objective}, {key}, rank {rank}"
                assert torch.allclose(found[key], value, rtol, atol), where


@pytest.mark.parametrize("widths", [widths for widths in PARTS if len(widths) > 1], ids=str)
def test_all_ranks_have_the_same_loss_and_statistics_to_the_last_bit(ranks, widths):
    """Otherwise their gradients would belong to different losses."""
    keys = [key for key in ranks[0] if key[0] == widths and len(key) == 3]
    assert len(keys) > 90
    for key in keys:
        for other in ranks[1 : len(widths)]:
            for name, value in ranks[0][key].items():
                assert name == "gradient" or torch.equal(value, other[key][name]), (key, name)


def test_every_batch_tests_what_it_is_for():
    whole = {name: dict(objectives(make(), None)) for name, make in BATCHES.items()}
    assert 0 < whole["plain"]["sampled"]["overlap/0"][0] < whole["plain"]["sampled"]["overlap/0"][1]
    assert whole["moved on"]["sampled"]["rl/clipped"][0] > 0
    assert whole["moved on"]["sampled"]["mismatch/clipped"][0] > 0
    logits = BATCHES["ties"]().logits.detach()
    assert ((logits == logits.amax(-1, keepdim=True)).sum(-1) > 1).any()
    assert whole["all equal"]["choices"]["greedy"].unique().tolist() == [0]
    assert BATCHES["top-k on the last rank"]().signals.teacher_top_ids.amax(-1).unique().tolist() == [0, 10]


@pytest.mark.parametrize("widths", [WIDE, (300, 300, 0)], ids=str)
def test_no_rank_ever_holds_more_than_its_own_columns(ranks, widths):
    k = random_batch().signals.teacher_top_ids.shape[1]
    for rank, width in enumerate(widths):
        elements = ranks[rank][widths, "elements"]
        allowed = WIDE_ROWS * max(width, k + 4)
        assert {key: size for key, size in elements.items() if size > allowed} == {}
        assert {name for name, _ in elements if name.startswith("c10d")} == {"c10d.allreduce_.default"}
