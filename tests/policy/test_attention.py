"""Packed attention against the same attention written as one T × T mask."""

from __future__ import annotations

import pytest
import torch

from copd_megatron.policy.attention import AttentionPlan, PackedAttention, PackedTokens
from copd_megatron.policy.context import Stripe
from copd_megatron.policy.packed import Segments

NONE = torch.empty(0, dtype=torch.int64)
CASES = {
    "prompts": Segments(torch.tensor([5, 5, 5]), NONE, NONE),
    "ragged prompts": Segments(torch.tensor([3, 7, 1]), NONE, NONE),
    "equal groups": Segments(torch.tensor([4, 4]), torch.tensor([3, 3, 3, 3]), torch.tensor([0, 0, 1, 1])),
    "ragged groups": Segments(torch.tensor([4, 9, 2]), torch.tensor([3, 0, 6, 1, 2]), torch.tensor([0, 0, 2, 1, 2])),
    "out of order": Segments(torch.tensor([4, 9]), torch.tensor([3, 5, 2]), torch.tensor([1, 0, 1])),
    "very different lengths": Segments(
        torch.tensor([70, 3, 130, 90, 5]), torch.tensor([2, 129, 66, 4]), torch.tensor([2, 1, 0, 4])
    ),
    "all see all": Segments(torch.tensor([6, 4, 6, 140]), NONE, NONE, causal=False),
    "all see all, equal": Segments(torch.tensor([6, 6]), NONE, NONE, causal=False),
}


def allowed(segments: Segments) -> torch.Tensor:
    """Who attends to whom, bool [T, T], from the definition of `Segments`."""
    lengths = segments.prompt_lengths, segments.response_lengths
    index = torch.cat([torch.repeat_interleave(torch.arange(len(each)), each) for each in lengths])
    answers = torch.arange(segments.tokens) >= segments.prompt_lengths.sum()
    same = (answers[:, None] == answers) & (index[:, None] == index)
    if segments.causal:
        same = same.tril()
    prompt = torch.where(answers, segments.prompt_of[index * answers] if answers.any() else index, index)
    return same | (answers[:, None] & ~answers & (prompt[:, None] == index))


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_a_full_mask(name: str, groups: int) -> None:
    segments = CASES[name]
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 8), (groups, 8), (groups, 8)
    inputs = [torch.randn(segments.tokens, 1, *shape, generator=generator, requires_grad=True) for shape in shapes]
    grad = torch.randn(segments.tokens, 1, 32, generator=generator)

    packed = PackedTokens(AttentionPlan.of(segments, torch.device("cpu")))
    ours = PackedAttention()(*inputs, packed_seq_params=packed)

    query, key, value = (tensor.squeeze(1).transpose(0, 1) for tensor in inputs)
    key, value = (tensor.repeat_interleave(4 // groups, dim=0) for tensor in (key, value))
    scores = (query @ key.transpose(1, 2) / 8**0.5).masked_fill(~allowed(segments), float("-inf"))
    plain = (scores.softmax(-1) @ value).transpose(0, 1).reshape(-1, 1, 32)

    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-6)
    for found, expected in zip(
        torch.autograd.grad(ours, inputs, grad), torch.autograd.grad(plain, inputs, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_rotary_angles_turn_queries_and_keys_before_they_meet() -> None:
    segments = CASES["ragged groups"]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(segments.tokens, 1, 2, 8, generator=generator) for _ in range(3))
    angles = torch.randn(segments.tokens, 1, 4, generator=generator).repeat(1, 1, 2)
    plan = AttentionPlan.of(segments, torch.device("cpu"))

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles[:, None].cos(), angles[:, None].sin()
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    inside = PackedAttention()(query, key, value, packed_seq_params=PackedTokens(plan, angles.cos(), angles.sin()))
    before = PackedAttention()(turned(query), turned(key), value, packed_seq_params=PackedTokens(plan))

    torch.testing.assert_close(inside, before, rtol=0, atol=2e-6)


def test_calls_group_sequences_of_similar_length() -> None:
    segments = CASES["very different lengths"]

    plan = AttentionPlan.of(segments, torch.device("cpu"))

    widths = [
        call.queries.stop - call.queries.start if isinstance(call.queries, slice) else len(call.queries) // call.rows
        for call in plan.calls
    ]
    assert widths == [5, 90, 130, 4, 66, 129]


def test_sequences_without_padding_need_no_index_and_no_mask() -> None:
    plan = AttentionPlan.of(CASES["prompts"], torch.device("cpu"))

    assert [(call.queries, call.keys, call.mask) for call in plan.calls] == [(slice(0, 15), slice(0, 15), None)]
    assert plan.unpack is None


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.causal])
def test_stripes_together_give_what_one_rank_gives(name: str, count: int) -> None:
    segments = CASES[name]
    missing = -segments.tokens % count
    if missing:  # as `share` does it
        segments = Segments(
            segments.prompt_lengths,
            torch.cat([segments.response_lengths, torch.tensor([missing])]),
            torch.cat([segments.prompt_of, torch.tensor([0])]),
        )
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(segments.tokens, 1, heads, 8, generator=generator) for heads in (4, 2, 2))
    whole = PackedAttention()(
        query, key, value, packed_seq_params=PackedTokens(AttentionPlan.of(segments, torch.device("cpu")))
    )
    keys_and_values = torch.stack([key.squeeze(1), value.squeeze(1)], dim=1)
    for rank in range(count):
        plan = AttentionPlan.of(segments, torch.device("cpu"), Stripe(rank, count))
        packed = PackedTokens(plan, gather=lambda own: keys_and_values)
        ours = PackedAttention()(*(each[rank::count] for each in (query, key, value)), packed_seq_params=packed)
        torch.testing.assert_close(ours, whole[rank::count], rtol=0, atol=2e-6)
