"""Attention over packed tokens: `Segments` say who attends to whom, `AttentionPlan` turns them into indices once per
micro-batch, and `PackedAttention` is the core attention that megatron-core's layers call with the plan.

Everything outside attention runs on T packed tokens. Inside, sequences of similar length are gathered into rows for
`scaled_dot_product_attention`, padded on the right: one row per prompt, which then needs no mask to be causal, and one
row per response, whose keys are its prompt's and its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from copd_megatron.policy.elementwise import rotate
from copd_megatron.policy.packed import Segments

SHORT = 64
"""Sequences up to this length may share a call whatever their lengths: a call costs more than the padding."""

FEW_KEYS = 2 * SHORT
"""On a CPU, attention under a mask to no more keys than this is faster with all its scores in memory at once."""


@dataclass(frozen=True)
class Rows:
    """Some sequences as rows of equal width: `token` int64 [rows, width] is the token in each slot, and `real` bool
    [rows, width] whether the slot is one of the sequence's own and not padding."""

    token: Tensor
    real: Tensor

    @staticmethod
    def of(starts: Tensor, lengths: Tensor) -> Rows:
        """Sequences with their first tokens at `starts`; both int64 [rows]."""
        slot = torch.arange(int(lengths.max()))
        real = slot < lengths[:, None]
        return Rows(starts[:, None] + slot * real, real)

    def causal(self) -> Tensor:
        """Every slot sees itself and those before it, bool [rows, width, width]; padding is behind all real tokens."""
        rows, width = self.token.shape
        return torch.ones(width, width, dtype=torch.bool).tril().expand(rows, -1, -1)

    def visible(self, queries: int) -> Tensor:
        """Each of so many queries sees the real slots, bool [rows, queries, width]."""
        return self.real[:, None, :].expand(-1, queries, -1)


@dataclass(frozen=True)
class Attend:
    """One call of `scaled_dot_product_attention`: `queries` pick the tokens that ask, `keys` those that answer.

    Either is an index int64 [rows * width], or a slice where it would count on by one. `mask` [rows, 1, queries, keys]
    is bool, True where attention is allowed, or, for few keys, what is added to the scores (0 or -inf); None where the
    shape and `causal` decide.
    """

    rows: int
    queries: Tensor | slice
    keys: Tensor | slice
    mask: Tensor | None
    causal: bool

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Tokens [T, heads, dim] to outputs [rows * width, heads * dim]."""
        q, k, v = (
            _pick(tokens, which).view(self.rows, -1, *tokens.shape[1:]).transpose(1, 2)
            for tokens, which in ((query, self.queries), (key, self.keys), (value, self.keys))
        )
        if self.mask is not None and self.mask.is_floating_point():
            attended = _few_keys_attention(q, k, v, self.mask, scale)
        else:
            attended = F.scaled_dot_product_attention(
                q, k, v, self.mask, is_causal=self.causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def _few_keys_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float | None) -> Tensor:
    """`scaled_dot_product_attention` in two batched products; the heads that share a key are so many more queries."""
    rows, heads, queries, size = query.shape
    groups, keys = key.shape[1:3]
    batch, asking = rows * groups, heads // groups * queries
    asked = query.reshape(batch, asking, size)
    key, value = (each.reshape(batch, keys, size) for each in (key, value))
    spread = bias.to(query.dtype).expand(rows, heads, queries, keys).reshape(batch, asking, keys)
    scores = torch.baddbmm(spread, asked, key.transpose(1, 2), alpha=size**-0.5 if scale is None else scale)
    return torch.bmm(scores.softmax(-1), value).view(rows, heads, queries, size)


def _pick(tokens: Tensor, which: Tensor | slice) -> Tensor:
    return tokens[which].contiguous() if isinstance(which, slice) else tokens.index_select(0, which)


@dataclass(frozen=True)
class AttentionPlan:
    """Indices and masks of one micro-batch, on the model's device; made once, used by every layer.

    `unpack` int64 [T] takes the calls' outputs, one after another, back to packed order; None where they are in it.
    """

    calls: tuple[Attend, ...]
    unpack: Tensor | None

    @staticmethod
    def of(segments: Segments, device: torch.device) -> AttentionPlan:
        """The plan for `segments`: one call per size of prompt, then one per size of response."""
        lengths = torch.cat([segments.prompt_lengths, segments.response_lengths])
        prompts, responses = (lengths.cumsum(0) - lengths).split(
            [len(part) for part in (segments.prompt_lengths, segments.response_lengths)]
        )
        calls, unpack, slots = [], torch.empty(int(lengths.sum()), dtype=torch.int64), 0

        def call(queries: Rows, keys: Tensor, mask: Tensor | None, causal: bool) -> None:
            nonlocal slots
            unpack[queries.token[queries.real]] = slots + queries.real.flatten().nonzero().flatten()
            slots += queries.real.numel()
            asks, answers = (_slice_or_index(tokens.flatten(), device) for tokens in (queries.token, keys))
            if mask is not None:
                if device.type == "cpu" and mask.shape[-1] <= FEW_KEYS:
                    mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
                mask = mask[:, None].to(device)
            calls.append(Attend(len(queries.token), asks, answers, mask, causal))

        for rows in _similar(segments.prompt_lengths):
            own = Rows.of(prompts[rows], segments.prompt_lengths[rows])
            all_see_all = segments.causal or bool(own.real.all())
            call(own, own.token, None if all_see_all else own.visible(1), segments.causal)
        for rows in _similar(segments.response_lengths):
            own = Rows.of(responses[rows], segments.response_lengths[rows])
            prompt_of = segments.prompt_of[rows]
            prompt = Rows.of(prompts[prompt_of], segments.prompt_lengths[prompt_of])
            mask = torch.cat([prompt.visible(own.token.shape[1]), own.causal()], dim=2)
            call(own, torch.cat([prompt.token, own.token], dim=1), mask, False)
        in_order = slots == len(unpack) and bool((unpack == torch.arange(slots)).all())
        return AttentionPlan(tuple(calls), None if in_order else unpack.to(device))


def _similar(lengths: Tensor) -> list[Tensor]:
    """Numbers of the sequences that share a call: none more than twice as long as another, unless both are short;
    empty sequences have no place in any."""
    size = lengths.clamp(min=SHORT).double().log2().ceil() * (lengths > 0)
    return [(size == each).nonzero().flatten() for each in size.unique().tolist() if each > 0]


def _slice_or_index(tokens: Tensor, device: torch.device) -> Tensor | slice:
    first = int(tokens[0])
    if torch.equal(tokens, torch.arange(first, first + len(tokens))):
        return slice(first, first + len(tokens))
    return tokens.to(device)


@dataclass(frozen=True)
class PackedTokens:
    """What travels through megatron-core's layers in the place of its `PackedSeqParams`.

    `cos` and `sin` [T, 1, dim] are of the rotary angles (None: no rotation), computed once for all layers.
    `visual_index` int64 [merged patches] says where images stand in T. `qkv_format` is what the layers read: any but
    "thd" leaves queries and keys to the core attention as they are.
    """

    plan: AttentionPlan
    cos: Tensor | None = None
    sin: Tensor | None = None
    visual_index: Tensor | None = None
    qkv_format: str = "packed"


class PackedAttention(torch.nn.Module):
    """Rotary positions and core attention (softmax of scaled scores times values) of packed tokens; no parameters."""

    def __init__(self, softmax_scale: float | None = None, **_: Any) -> None:
        """Of what layers give to their core attention only the scale is needed (None: dim ** -0.5)."""
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        packed_seq_params: PackedTokens,
        **_: Any,
    ) -> Tensor:
        """`query` [T, 1, heads, dim], `key` and `value` [T, 1, groups, dim] to [T, 1, heads * dim]."""
        packed = packed_seq_params
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed.cos is not None and packed.sin is not None:
            query, key = rotate(query, packed.cos, packed.sin), rotate(key, packed.cos, packed.sin)
        outputs = [attend(query, key, value, self.softmax_scale) for attend in packed.plan.calls]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if packed.plan.unpack is not None:
            output = output.index_select(0, packed.plan.unpack)
        return output.unsqueeze(1)
