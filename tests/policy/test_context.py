"""What a context parallel rank computes of a micro-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_qwen3_vl import conversation, pack

from copd_megatron.policy.context import Stripe, share
from copd_megatron.policy.packed import MicroBatch, Signals, idle


@pytest.fixture
def batch() -> MicroBatch:
    packed = pack([conversation(2, 5, [4, 6], [(1, 4, 8)]), conversation(1, 9, [5, 3])])
    rows = torch.arange(len(packed.targets))
    signals = Signals(source=rows, weight=rows * 0.1, advantage=rows * 0.2, engine_logprobs=rows * 0.3)
    return replace(packed, signals=signals)


def test_one_rank_with_nothing_to_divide_gets_the_batch_as_it_is(batch: MicroBatch) -> None:
    assert share(batch, Stripe()) is batch


@pytest.mark.parametrize(("count", "multiple"), [(2, 1), (3, 1), (2, 4), (1, 16)])
def test_shares_are_equal_and_hold_every_token_once(batch: MicroBatch, count: int, multiple: int) -> None:
    shares = [share(batch, Stripe(rank, count), multiple) for rank in range(count)]
    length = len(shares[0].token_ids)
    assert length % multiple == 0
    assert all(len(part.token_ids) == length == part.position_ids.shape[1] for part in shares)
    woven = torch.stack([part.token_ids for part in shares], dim=1).flatten()
    assert torch.equal(woven[: batch.segments.tokens], batch.token_ids)
    assert 0 <= len(woven) - batch.segments.tokens < count * multiple
    assert all(part.segments.tokens == len(woven) for part in shares)


def test_each_response_token_is_predicted_on_the_rank_that_holds_its_predictor(batch: MicroBatch) -> None:
    shares = [share(batch, Stripe(rank, 3)) for rank in range(3)]
    seen = torch.cat([part.response_rows for part in shares if part.response_rows is not None])
    assert sorted(seen.tolist()) == list(range(len(batch.targets)))
    for rank, part in enumerate(shares):
        rows = part.response_rows
        assert torch.equal(part.targets, batch.targets[rows])
        assert torch.equal(part.sequence, batch.sequence[rows])
        assert torch.equal(part.signals.engine_logprobs, batch.signals.engine_logprobs[rows])
        assert torch.equal(part.logit_index * 3 + rank, batch.logit_index[rows])


def test_patches_go_where_their_tokens_go(batch: MicroBatch) -> None:
    shares = [share(batch, Stripe(rank, 3)) for rank in range(3)]
    for rank, part in enumerate(shares):
        assert torch.equal(part.visual_index * 3 + rank, batch.visual_index[part.visual_rows])
        assert part.pixel_values is batch.pixel_values, "the tower sees every image"
    assert sorted(torch.cat([part.visual_rows for part in shares]).tolist()) == list(range(len(batch.visual_index)))


def test_an_idle_batch_weighs_nothing() -> None:
    batch = idle()
    assert batch.segments.tokens == len(batch.token_ids) == 1
    assert not batch.signals.weight.any()
    assert [len(share(batch, Stripe(rank, 2), 2).token_ids) for rank in range(2)] == [2, 2]
