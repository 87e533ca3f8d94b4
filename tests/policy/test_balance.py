"""Work is divided evenly, stays where it can, and is all still there afterwards."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from tiny_policy import base_folder, make_samples

from copd_megatron.policy.balance import Cost, partition, rebalance
from copd_megatron.policy.batching import by_prompt
from copd_megatron.rollout.types import Media, Prompt


def spread(costs: list[float], parts: list[list[int]]) -> float:
    sums = [sum(costs[index] for index in part) for part in parts]
    return max(sums) - min(sums)


def test_every_index_is_in_one_part() -> None:
    costs = [random.Random(7).random() for _ in range(23)]
    parts = partition(costs, 4)
    assert sorted(index for part in parts for index in part) == list(range(23))
    assert all(part == sorted(part) for part in parts)


def test_differencing_beats_giving_the_largest_to_the_lightest() -> None:
    costs = [8.0, 7.0, 6.0, 5.0, 4.0]
    assert spread(costs, partition(costs, 2)) == 2.0, "largest first ends with 17 and 13"


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_parts_are_close_to_the_best_division(ranks: int) -> None:
    draw = random.Random(ranks)
    costs = [float(draw.randrange(1, 40)) for _ in range(8)]
    best = min(
        spread(costs, [[i for i, to in enumerate(choice) if to == rank] for rank in range(ranks)])
        for choice in product(range(ranks), repeat=len(costs))
    )
    assert spread(costs, partition(costs, ranks)) <= best + 0.25 * max(costs)


def test_fewer_costs_than_parts_leave_parts_empty() -> None:
    assert sorted(map(len, partition([3.0, 1.0], 4))) == [0, 0, 1, 1]
    assert partition([], 3) == [[], [], []]


def everyone(groups: list[list[str]], costs: list[list[float]]) -> list[list[str]]:
    """`rebalance` on all ranks at once: its two exchanges are answered with what every rank says."""
    said: list[list[object]] = [[], []]

    def gather(rank: int, turn: list[int]):  # type: ignore[no-untyped-def]
        def exchange(value: object) -> list[object]:
            number, turn[0] = turn[0], turn[0] + 1
            if len(said[number]) <= rank:
                said[number].append(value)
            return said[number] if len(said[number]) == len(groups) else [*costs] if number == 0 else said[number]

        return exchange

    for rank, (mine, cost) in enumerate(zip(groups, costs, strict=True)):
        rebalance(mine, cost, rank, gather(rank, [0]))  # first round: everybody says what is sent
    return [
        rebalance(mine, cost, rank, gather(rank, [0]))
        for rank, (mine, cost) in enumerate(zip(groups, costs, strict=True))
    ]


def test_groups_move_to_even_the_load_and_none_is_lost() -> None:
    groups = [["a", "b", "c", "d"], ["e"], []]
    costs = [[4.0, 4.0, 4.0, 4.0], [1.0], []]
    shares = everyone(groups, costs)
    assert sorted(name for share in shares for name in share) == ["a", "b", "c", "d", "e"]
    cost = dict(zip("abcde", [4.0, 4.0, 4.0, 4.0, 1.0], strict=True))
    assert max(sum(cost[name] for name in share) for share in shares) == 8.0


def test_what_is_even_already_stays_where_it_is() -> None:
    assert everyone([["a"], ["b"]], [[5.0], [5.0]]) == [["a"], ["b"]]
    assert everyone([["a", "b"], ["c"]], [[2.0, 3.0], [5.0]]) == [["a", "b"], ["c"]]


def test_cost_counts_tokens_pairs_and_patches() -> None:
    cost = Cost(token=1.0, pair=10.0, patch=100.0, patch_pair=1000.0)
    text = Prompt("t", "text", (1, 2), "", "exact", "")
    assert cost.group(text, [2, 4]) == 8 + 10 * (2 + (4 + 2) + (8 + 8))
    media = Media(torch.zeros(12, 3), torch.tensor([[1, 2, 2], [2, 2, 2]]))
    picture = Prompt("i", "image", (1, 2), "", "exact", "", media)
    assert cost.group(picture, []) == 2 + 10 * 2 + 100 * 12 + 1000 * 3 * 16


def test_samples_of_a_prompt_are_one_group(tmp_path_factory: pytest.TempPathFactory) -> None:
    samples = make_samples(base_folder(tmp_path_factory.mktemp("policy") / "base"), prompts=3, group=2)
    assert by_prompt([samples[0], samples[2], samples[1], samples[3]]) == [[0, 2], [1, 3]]
