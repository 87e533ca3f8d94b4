"""Every example once per epoch, whatever the batch, the number of ranks and the interruptions."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.data.sampler import Sampler, furthest
from copd_megatron.errors import DataError

sizes = st.integers(1, 20)
worlds = st.integers(1, 5)
batches = st.lists(st.integers(0, 45), max_size=4)


def drawn_by_all(size: int, world: int, batches: list[int], states: list[dict[str, object]] | None = None) -> list[int]:
    """What all ranks draw, in the stream's order."""
    ranks = [Sampler(size, seed=7, name="text", rank=rank, world=world) for rank in range(world)]
    for sampler, state in zip(ranks, states or [], strict=False):
        sampler.load_state_dict(state)
    per_rank = [[index for count in batches for index in sampler.draw(count)] for sampler in ranks]
    return [index for place in zip(*per_rank, strict=True) for index in place]


@given(sizes, worlds, batches)
def test_every_epoch_visits_every_example_once(size: int, world: int, batches: list[int]) -> None:
    stream = drawn_by_all(size, world, batches)
    for start in range(0, len(stream), size):
        epoch = stream[start : start + size]
        assert len(set(epoch)) == len(epoch)
        if len(epoch) == size:
            assert sorted(epoch) == list(range(size))


@given(sizes, worlds, batches)
def test_number_of_ranks_and_batch_sizes_do_not_change_the_stream(size: int, world: int, batches: list[int]) -> None:
    assert drawn_by_all(size, world, batches) == Sampler(size, 7, "text").draw(world * sum(batches))


@given(sizes, worlds, worlds, batches, batches)
def test_resuming_with_any_number_of_ranks_skips_and_repeats_nothing(
    size: int, before: int, after: int, first: list[int], second: list[int]
) -> None:
    stopped = Sampler(size, 7, "text", rank=before - 1, world=before)
    for count in first:
        stopped.draw(count)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = drawn_by_all(size, before, first) + drawn_by_all(size, after, second, [state] * after)
    assert resumed == Sampler(size, 7, "text").draw(len(resumed))


@pytest.mark.parametrize("drawn", [8, 16, 24])
def test_resuming_exactly_at_the_end_of_an_epoch_starts_the_next(drawn: int) -> None:
    sampler = Sampler(8, 0, "text")
    sampler.draw(drawn)
    resumed = Sampler(8, 0, "text")
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.epoch == drawn // 8
    following = resumed.draw(8)
    assert sorted(following) == list(range(8))
    assert following == sampler.draw(8)


def test_batch_larger_than_the_data_set_is_filled() -> None:
    assert Counter(Sampler(3, 0, "text").draw(30)) == {0: 10, 1: 10, 2: 10}


def test_epochs_seeds_and_names_have_orders_of_their_own() -> None:
    sampler = Sampler(50, 0, "text")
    orders = [sampler.draw(50), sampler.draw(50), Sampler(50, 1, "text").draw(50), Sampler(50, 0, "image").draw(50)]
    assert len({tuple(order) for order in orders}) == 4
    assert list(range(50)) not in orders


def test_order_is_the_same_on_every_machine_and_version() -> None:
    assert Sampler(8, 0, "text").draw(16) == [3, 7, 2, 4, 1, 0, 6, 5, 7, 2, 0, 3, 5, 1, 6, 4]


def test_global_random_state_is_neither_used_nor_changed() -> None:
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), str(np.random.get_state())
    first = Sampler(20, 0, "text").draw(50)
    assert (random.getstate(), str(np.random.get_state())) == before
    random.seed(2)
    np.random.seed(2)
    assert Sampler(20, 0, "text").draw(50) == first


def test_ranks_that_drew_different_numbers_resume_without_repeating() -> None:
    ranks = [Sampler(30, 0, "text", rank, 3) for rank in range(3)]
    before = [index for sampler, count in zip(ranks, (2, 4, 3), strict=True) for index in sampler.draw(count)]
    state = furthest([sampler.state_dict() for sampler in ranks])
    for sampler in ranks:
        sampler.load_state_dict(state)
    after = [index for sampler in ranks for index in sampler.draw(5)]
    assert len({*before, *after}) == len(before) + len(after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 9}, "size 9, this run has 8"),
        ({"seed": 1}, "seed 1, this run has 0"),
        ({"name": "image"}, "name 'image', this run has 'text'"),
        ({"position": -1}, "position is -1"),
        ({"position": 2.5}, "position is 2.5"),
        ({"extra": 1}, "expected"),
    ],
)
def test_state_of_another_stream_is_refused(change: dict[str, object], message: str) -> None:
    sampler = Sampler(8, 0, "text")
    with pytest.raises(DataError, match=message):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    with pytest.raises(DataError, match="the saved state has"):
        sampler.load_state_dict({})
    assert sampler.draw(8) == Sampler(8, 0, "text").draw(8)


def test_impossible_samplers_are_refused() -> None:
    with pytest.raises(DataError, match="0 examples"):
        Sampler(0, 0, "text")
    with pytest.raises(ValueError, match="rank 2 is not below world 2"):
        Sampler(5, 0, "text", rank=2, world=2)
    with pytest.raises(ValueError, match="cannot draw -1"):
        Sampler(5, 0, "text").draw(-1)
