"""Dividing work among ranks: what a group of samples costs, and parts of about equal cost."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from copd_megatron.rollout.types import Prompt

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

Item = TypeVar("Item")


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a forward pass (backward passes take twice as many, in the same proportion).

    `token` per token of the language model, `pair` per pair of tokens that attend to each other, `patch` per
    patch of an image or a video, `patch_pair` per pair of patches of a frame.
    """

    token: float
    pair: float
    patch: float
    patch_pair: float

    @staticmethod
    def of(settings: Qwen3VLSettings) -> Cost:
        """Of a model, from the sizes of its matrices."""
        from copd_megatron.policy.qwen3_vl.vision_settings import WindowSettings

        text, vision, tower = settings.text_config, settings.vision_config, settings.vision
        experts = text.moe_router_topk if text.num_moe_experts else 1
        inner = text.moe_ffn_hidden_size if text.num_moe_experts else text.ffn_hidden_size
        heads = text.num_attention_heads * text.kv_channels
        matrices = text.hidden_size * (2 * heads + 2 * text.num_query_groups * text.kv_channels + 3 * inner * experts)
        token, pair = 2.0 * text.num_layers * matrices, 4.0 * text.num_layers * heads
        if vision is None or tower is None:
            return Cost(token, pair, patch=0.0, patch_pair=0.0)
        width = vision.hidden_size
        patches = width * (4 * width + (3 if vision.gated_linear_unit else 2) * vision.ffn_hidden_size)
        patch, patch_pair = 2.0 * vision.num_layers * patches, 4.0 * vision.num_layers * width
        if isinstance(tower, WindowSettings):
            whole = len(tower.full_layers) / vision.num_layers
            patch += (1 - whole) * patch_pair * (tower.window * tower.merge) ** 2
            patch_pair *= whole
        return Cost(token, pair, patch, patch_pair)

    def group(self, prompt: Prompt, responses: Sequence[int]) -> float:
        """Of a prompt and responses of these lengths behind it, the prompt computed once."""
        start = len(prompt.token_ids)
        tokens = start + sum(responses)
        pairs = start**2 / 2 + sum(length * start + length**2 / 2 for length in responses)
        grids = [] if prompt.media is None else prompt.media.grid_thw.tolist()
        patches = sum(t * h * w for t, h, w in grids)
        patch_pairs = sum(t * (h * w) ** 2 for t, h, w in grids)
        return self.token * tokens + self.pair * pairs + self.patch * patches + self.patch_pair * patch_pairs


def partition(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Indices of `costs` in `parts` parts of about equal sum, each part ascending: Karmarkar and Karp's differencing.

    Every cost starts as a division of its own: all of it in one part, nothing in the others. The two divisions with the
    largest spread are joined, heavy parts of one with light parts of the other, until one is left. Ties are broken by
    index, so that the result depends on `costs` alone.
    """
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = [
        (-cost, index, [(0.0, [])] * (parts - 1) + [(cost, [index])]) for index, cost in enumerate(costs)
    ]
    if not heap:
        return [[] for _ in range(parts)]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, first, one), (_, second, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = sorted(
            (
                (light + heavy, mine + theirs)
                for (light, mine), (heavy, theirs) in zip(one, reversed(other), strict=True)
            ),
            key=lambda part: part[0],
        )
        heapq.heappush(heap, (joined[0][0] - joined[-1][0], min(first, second), joined))
    return sorted((sorted(indices) for _, indices in heap[0][2]), key=lambda part: part[:1] or [len(costs)])


def rebalance(
    groups: Sequence[Item], costs: Sequence[float], rank: int, gather: Callable[[object], list[object]]
) -> list[Item]:
    """This rank's share of all ranks' `groups`, so that the shares cost about the same. Collective.

    `costs` are those of this rank's groups; `gather` gives every rank's value of what it is called with, in order of
    rank. A group stays where it is as far as the division allows; only the others are sent. The result is in order of
    the ranks that the groups came from.
    """
    everyone: list[list[float]] = gather(list(costs))  # type: ignore[assignment]
    owner = [number for number, part in enumerate(everyone) for _ in part]
    flat = [cost for part in everyone for cost in part]
    target = [0] * len(flat)
    for to, indices in _settled(partition(flat, len(everyone)), owner, flat):
        for index in indices:
            target[index] = to
    first = sum(map(len, everyone[:rank]))
    own = list(enumerate(groups, start=first))
    sent = {index: group for index, group in own if target[index] != rank}
    arrived: list[dict[int, Item]] = gather(sent)  # type: ignore[assignment]
    mine = {index: group for index, group in own if target[index] == rank}
    mine |= {index: group for part in arrived for index, group in part.items() if target[index] == rank}
    return [mine[index] for index in sorted(mine)]


def _settled(
    parts: Sequence[Sequence[int]], owner: Sequence[int], costs: Sequence[float]
) -> list[tuple[int, Sequence[int]]]:
    """(rank, part): parts that are mostly somewhere already get that rank first."""
    at_home = {
        (part, rank): sum(costs[index] for index in indices if owner[index] == rank)
        for part, indices in enumerate(parts)
        for rank in range(len(parts))
    }
    settled: dict[int, int] = {}
    for part, rank in sorted(at_home, key=lambda pair: (-at_home[pair], pair)):
        if part not in settled and rank not in settled.values():
            settled[part] = rank
    return [(settled[part], indices) for part, indices in enumerate(parts)]
