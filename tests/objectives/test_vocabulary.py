"""One process: blocks of rows change nothing, and little memory is used."""

from __future__ import annotations

import pytest
import torch
from batches import random_batch
from memory import Outputs

from copd_kernels import reference
from copd_megatron.objectives import partition
from copd_megatron.objectives.token_stats import overlap
from copd_megatron.objectives.vocabulary import Vocabulary, greedy, partition_at, ranks_of, token_logprobs

FORMATS = [torch.float64, torch.float32, torch.bfloat16]


def logits_and_ids(
    rows: int = 13, width: int = 37, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with ties and −inf, and four distinct likely ids per row after a first that may be one of them."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, width, generator=generator) * 8).round() / 4
    logits[:, width // 2] = -torch.inf
    others = (logits + 2 * torch.randn(rows, width, generator=generator)).topk(4).indices
    first = torch.where(torch.arange(rows) % 2 == 0, others[:, 2], torch.randint(width, (rows,), generator=generator))
    first = first.masked_fill(first == width // 2, 0)
    return logits.to(dtype).requires_grad_(), torch.cat([first[:, None], others], -1)


def found_at(logits, ids, temperature=1.0, part=None) -> tuple[torch.Tensor, ...]:
    found = partition_at(logits, ids, temperature, part)
    return found.logprobs, found.entropy, found.logsumexp


def slope(ids: torch.Tensor) -> torch.Tensor:
    return torch.randn(ids.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture(params=[1, 40, 150, 1 << 18], ids="block{}".format)
def block(request, monkeypatch):
    monkeypatch.setitem(partition.BLOCK_ELEMENTS, "cpu", request.param)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_are_the_reference_s_to_the_last_bit(dtype, temperature):
    logits, ids = logits_and_ids(dtype=dtype)
    never = ids == logits.shape[1] // 2  # log-probability −inf: no loss can use it
    results = []
    for function in (reference.logprobs_at, found_at):
        logprobs, entropy, logsumexp = function(logits, ids, temperature)
        weighted = (logprobs * slope(ids).to(logprobs.dtype)).masked_fill(never, 0)
        (gradient,) = torch.autograd.grad(weighted.sum(), logits)
        results.append((logprobs, entropy, logsumexp, gradient))
    assert results[0][3].isfinite().all()
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)


def test_gradient_of_ids_that_repeat_in_any_way():
    logits, _ = logits_and_ids(rows=4, width=6, dtype=torch.float64)
    logits = logits.detach().nan_to_num(neginf=-1.0).requires_grad_()
    ids = torch.tensor([[0, 0, 0, 0], [1, 2, 1, 1], [3, 5, 5, 3], [4, 2, 2, 2]])
    expected = torch.autograd.grad((reference.logprobs_at(logits, ids)[0] * slope(ids)).sum(), logits)[0]
    found = torch.autograd.grad((found_at(logits, ids)[0] * slope(ids)).sum(), logits)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_tail_and_its_gradient_are_the_reference_s(dtype, temperature):
    """Of ids of which the first comes twice in half of the rows."""
    logits, ids = logits_and_ids(dtype=dtype)
    exact = logits.detach().double().requires_grad_()
    log_softmax = torch.log_softmax(exact / temperature, -1)
    expected = reference.tail_logprob(log_softmax, ids)
    found = partition_at(logits, ids, temperature).tail
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 2e-6}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    weight = slope(ids)[:, 0]
    (gradient,) = torch.autograd.grad((found * weight.to(found.dtype)).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), exact)
    if dtype == torch.bfloat16:
        tolerance = {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(gradient.double(), wanted.nan_to_num(), **tolerance)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("dtype", FORMATS)
def test_ranks_and_overlap_are_the_reference_s(dtype):
    logits, ids = logits_and_ids(dtype=dtype)
    assert torch.equal(ranks_of(logits, ids), reference.ranks_of(logits, ids))
    rows = torch.tensor([11, 0, 5])
    assert torch.equal(ranks_of(logits, ids[rows], rows=rows), reference.ranks_of(logits[rows], ids[rows]))
    expected = reference.topk_overlap(logits[rows], ids[rows, 1:], 3)
    assert torch.equal(overlap(logits, ids[rows, 1:], 3, rows=rows), expected)
    assert 0 < expected.sum() < 3


def test_ranks_are_places_in_a_stable_sort():
    logits, _ = logits_and_ids()
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    assert ranks_of(logits, order).tolist() == [list(range(37))] * 13
    assert torch.equal(greedy(logits), order[:, 0])


def test_token_logprobs_are_those_that_training_sees():
    batch = random_batch()
    found = token_logprobs(batch.logits, batch.targets, 0.7)
    expected = found_at(batch.logits, torch.stack([batch.targets, batch.targets], -1), 0.7)[0][:, 1]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_for_backward_are_the_logits_themselves_and_nothing_else_of_their_size(dtype):
    logits, ids = logits_and_ids(dtype=dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        partition_at(logits, ids, 0.7)
    large = [tensor for tensor in kept if tensor.numel() > ids.numel()]
    assert [tensor.data_ptr() for tensor in large] == [logits.data_ptr()]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_bfloat16_logits_are_never_copied_to_float32_as_a_whole(temperature, monkeypatch):
    monkeypatch.setitem(partition.BLOCK_ELEMENTS, "cpu", 3 * 200)
    logits, ids = logits_and_ids(width=200, dtype=torch.bfloat16)
    with Outputs() as outputs:
        found = partition_at(logits, ids, temperature)
        ranks_of(logits.detach(), ids, rows=torch.arange(13))
        (found.logprobs[:, 0] + found.tail).sum().backward()
    assert outputs.largest(torch.float32) == outputs.largest(torch.bool) == 3 * 200
    assert outputs.largest(torch.bfloat16) == 13 * 200, "the gradient"


def test_a_vocabulary_in_one_part_is_the_same_as_none():
    logits, ids = logits_and_ids()
    whole = Vocabulary(0, 37, None)
    for found, expected in zip(found_at(logits, ids, 1.0, whole), found_at(logits, ids), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(ranks_of(logits, ids, whole), ranks_of(logits, ids))
    assert torch.equal(greedy(logits, whole), greedy(logits))


@pytest.mark.parametrize("function", [partition_at, ranks_of])
@pytest.mark.parametrize("beyond", [-1, 37])
def test_ids_outside_the_vocabulary_are_refused(function, beyond):
    logits, ids = logits_and_ids()
    ids[3, 1] = beyond
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        function(logits, ids, 1.0) if function is partition_at else function(logits, ids)


def test_logits_that_are_not_what_the_vocabulary_says_are_refused():
    logits, ids = logits_and_ids()
    with pytest.raises(ValueError, match="37 columns from id 5 on, but the vocabulary has 40 ids; cut off the padding"):
        partition_at(logits, ids, 1.0, Vocabulary(5, 40, None))
    with pytest.raises(ValueError, match="37 columns of 40, and no group to ask for the others"):
        greedy(logits, Vocabulary(0, 40, None))
