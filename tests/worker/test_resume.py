"""Prompt streams that go on with another number of replicas."""

from __future__ import annotations

import pytest

from copd_megatron.data.sampler import Sampler
from copd_megatron.worker.resume import own_streams, rank_state

SIZE = 30


def samplers(replicas: int) -> list[Sampler]:
    return [Sampler(SIZE, 1, "text", replica, replicas) for replica in range(replicas)]


def save(members: list[Sampler], ranks_per_replica: int = 1) -> list[dict]:
    """What the ranks of a gang save; the first rank of each replica has the streams."""
    return [
        rank_state(
            replica, {"text": {"sampler": one.state_dict(), "refused": {"too long": 1}}} if leader == 0 else None
        )
        for replica, one in enumerate(members)
        for leader in range(ranks_per_replica)
    ]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2), (2, 4), (4, 2), (3, 2)])
@pytest.mark.parametrize("ranks_per_replica", [1, 2])
def test_no_example_comes_twice_or_is_left_out(before: int, after: int, ranks_per_replica: int) -> None:
    first = samplers(before)
    drawn = [index for one in first for index in one.draw(12 // before)]
    saved = save(first, ranks_per_replica)
    second = samplers(after)
    refused = 0
    for replica, one in enumerate(second):
        stream = own_streams(saved, replica, after)["text"]
        one.load_state_dict(stream["sampler"])
        refused += stream["refused"].get("too long", 0)
    assert refused == before, "counted once each"
    drawn += [index for one in second for index in one.draw(12 // after)]
    undisturbed = Sampler(SIZE, 1, "text").draw(24)
    assert sorted(drawn) == sorted(undisturbed)
    assert len(set(drawn)) == 24


def test_replicas_that_drew_different_numbers_go_on_where_they_stood() -> None:
    first = samplers(2)
    first[0].draw(3)
    first[1].draw(5)
    expected = [one.draw(4) for one in (_copy(one, replica) for replica, one in enumerate(first))]
    saved = save(first)
    second = samplers(2)
    for replica, one in enumerate(second):
        one.load_state_dict(own_streams(saved, replica, 2)["text"]["sampler"])
    assert [one.draw(4) for one in second] == expected


def test_other_number_of_replicas_goes_on_from_the_furthest() -> None:
    first = samplers(2)
    seen = set(first[0].draw(3)) | set(first[1].draw(5))
    alone = Sampler(SIZE, 1, "text")
    alone.load_state_dict(own_streams(save(first), 0, 1)["text"]["sampler"])
    assert not seen & set(alone.draw(SIZE - 10))


def _copy(sampler: Sampler, replica: int) -> Sampler:
    twin = Sampler(SIZE, 1, "text", replica, 2)
    twin.load_state_dict(sampler.state_dict())
    return twin
