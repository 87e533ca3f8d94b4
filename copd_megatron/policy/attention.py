"""Attention over packed tokens: `Segments` say who attends to whom, `AttentionPlan` turns them into indices once per
micro-batch, and `PackedAttention` is the core attention that megatron-core's layers call with the plan.

Everything outside attention runs on T packed tokens. Inside, sequences of similar length are gathered into rows for
`scaled_dot_product_attention`, padded on the right: one row per prompt, which then needs no mask to be causal, and one
row per response, whose keys are its prompt's and its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from copd_megatron.policy.context import WHOLE, Stripe
from copd_megatron.policy.elementwise import rotate
from copd_megatron.policy.packed import Segments

SHORT = 64
"""Sequences up to this length may share a call whatever their lengths: a call costs more than the padding."""

FEW_KEYS = 2 * SHORT
"""On a CPU, attention under a mask to no more keys than this is faster with all its scores in memory at once."""


@dataclass(frozen=True)
class Rows:
    """Some sequences, or every so many-th of their tokens, as rows of equal width.

    `token` int64 [rows, width] is the token in each place, `slot` int64 [rows, width] its number in its sequence, and
    `real` bool [rows, width] whether it is one of the sequence's own and not padding.
    """

    token: Tensor
    slot: Tensor
    real: Tensor

    @staticmethod
    def of(starts: Tensor, lengths: Tensor, stripe: Stripe = WHOLE) -> Rows:
        """Sequences with their first tokens at `starts`, both int64 [rows]: those of their tokens that are in
        `stripe`."""
        first = (stripe.rank - starts) % stripe.count
        slot = first[:, None] + stripe.count * torch.arange(-(-int(lengths.max()) // stripe.count))
        real = slot < lengths[:, None]
        return Rows(starts[:, None] + slot * real, slot, real)

    def seen_causally(self, queries: Rows) -> Tensor:
        """Each of `queries`, of the same sequences, sees itself and those before it, bool [rows, queries, width]."""
        return self.slot[:, None, :] <= queries.slot[:, :, None]

    def seen(self, queries: int) -> Tensor:
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
    def of(segments: Segments, device: torch.device, stripe: Stripe = WHOLE) -> AttentionPlan:
        """The plan for `segments`: one call per size of prompt, then one per size of response. Of a `stripe`, only its
        own tokens ask; the keys are still those of all tokens."""
        lengths = torch.cat([segments.prompt_lengths, segments.response_lengths])
        prompts, responses = (lengths.cumsum(0) - lengths).split(
            [len(part) for part in (segments.prompt_lengths, segments.response_lengths)]
        )
        calls, slots = [], 0
        unpack = torch.empty(int(lengths.sum()) // stripe.count, dtype=torch.int64)

        def call(queries: Rows, keys: Tensor, mask: Tensor | None, causal: bool) -> None:
            nonlocal slots
            unpack[stripe.place(queries.token[queries.real])] = slots + queries.real.flatten().nonzero().flatten()
            slots += queries.real.numel()
            asks = _slice_or_index((stripe.place(queries.token) * queries.real).flatten(), device)
            if mask is not None:
                if device.type == "cpu" and mask.shape[-1] <= FEW_KEYS:
                    mask = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)
                mask = mask[:, None].to(device)
            calls.append(Attend(len(queries.token), asks, _slice_or_index(keys.flatten(), device), mask, causal))

        for rows in _similar(segments.prompt_lengths):
            starts, sizes = prompts[rows], segments.prompt_lengths[rows]
            own, keys = Rows.of(starts, sizes, stripe), Rows.of(starts, sizes)
            if not segments.causal:
                call(own, keys.token, None if bool(keys.real.all()) else keys.seen(1), False)
            else:
                call(own, keys.token, None if stripe.count == 1 else keys.seen_causally(own), stripe.count == 1)
        for rows in _similar(segments.response_lengths):
            starts, sizes, prompt_of = responses[rows], segments.response_lengths[rows], segments.prompt_of[rows]
            own, keys = Rows.of(starts, sizes, stripe), Rows.of(starts, sizes)
            prompt = Rows.of(prompts[prompt_of], segments.prompt_lengths[prompt_of])
            mask = torch.cat([prompt.seen(own.token.shape[1]), keys.seen_causally(own)], dim=2)
            call(own, torch.cat([prompt.token, keys.token], dim=1), mask, False)
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
class FeatureRows:
    """DeepStack's features in a layer's hidden states: feature row `rows[i]` (None: row i) is added to hidden state
    `index[i]`, both int64. `first` is the number of the decoder layer, from 0, that adds the first of the features."""

    index: Tensor
    rows: Tensor | None
    first: int = 0


@dataclass(frozen=True)
class PackedTokens:
    """What travels through megatron-core's layers in the place of its `PackedSeqParams`.

    `cos` and `sin` [T, 1, dim] are of the rotary angles (None: no rotation), computed once for all layers.
    `gather` brings keys and values [T, …] of all context parallel ranks together in packed order (None: there is one).
    `features` says what DeepStack adds in a layer. `qkv_format` is what the layers read: any but "thd" leaves queries
    and keys to the core attention as they are.
    """

    plan: AttentionPlan
    cos: Tensor | None = None
    sin: Tensor | None = None
    gather: Callable[[Tensor], Tensor] | None = None
    features: FeatureRows | None = None
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
        if packed.gather is not None:
            key, value = packed.gather(torch.stack([key, value], dim=1)).unbind(1)
        outputs = [attend(query, key, value, self.softmax_scale) for attend in packed.plan.calls]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if packed.plan.unpack is not None:
            output = output.index_select(0, packed.plan.unpack)
        return output.unsqueeze(1)
