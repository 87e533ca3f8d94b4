"""Attention over packed tokens: `Segments` say who attends to whom, `AttentionPlan` turns them into indices once per
micro-batch, and `PackedAttention` is the core attention that megatron-core's layers call with the plan.

Everything outside attention runs on T packed tokens. Inside, tokens are gathered into padded rows for
`scaled_dot_product_attention`: one row per prompt (padding on the right, so a causal prompt needs no mask), and one row
per response, whose keys are its prompt's and its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from copd_megatron.policy.packed import Segments


@dataclass(frozen=True)
class Rows:
    """Ragged sequences that lie one after another, seen as padded rows.

    `gather` int64 [rows * width] is the token of each slot (any token where a slot is padding); `slots` int64 [tokens]
    is the slot of each token.
    """

    gather: Tensor
    slots: Tensor
    rows: int
    width: int

    @staticmethod
    def of(lengths: Tensor) -> Rows:
        """Rows for sequences of these `lengths` (int64 [rows], on the CPU)."""
        rows, width = len(lengths), int(lengths.max())
        row = torch.repeat_interleave(torch.arange(rows), lengths)
        offset = torch.arange(len(row)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        slots = row * width + offset
        gather = torch.zeros(rows * width, dtype=torch.int64)
        gather[slots] = torch.arange(len(row))
        return Rows(gather, slots, rows, width)


@dataclass(frozen=True)
class AttentionPlan:
    """The indices and masks of one micro-batch, on the device of the model; made once, used by every layer.

    `prompts` int64 [P * Lp] and `responses` int64 [B * Lr] gather queries; `keys` int64 [B * (Lp + Lr)] the keys and
    values of responses; `unpack` int64 [T] takes padded outputs (prompts' slots, then responses') back to packed order.
    Masks are True where attention is allowed; None where the shape alone decides.
    """

    causal: bool
    prompts: Tensor
    prompt_rows: int
    prompt_mask: Tensor | None
    responses: Tensor
    response_rows: int
    keys: Tensor
    response_mask: Tensor | None
    unpack: Tensor

    @staticmethod
    def of(segments: Segments, device: torch.device) -> AttentionPlan:
        """The plan for `segments`."""
        prompt = Rows.of(segments.prompt_lengths)
        key_is_real = torch.arange(prompt.width) < segments.prompt_lengths[:, None]
        ragged = not bool(key_is_real.all())
        filled = segments.response_lengths > 0
        lengths, prompt_of = segments.response_lengths[filled], segments.prompt_of[filled]
        responses = keys = torch.empty(0, dtype=torch.int64)
        unpack, response_mask = prompt.slots, None
        if len(lengths):
            response = Rows.of(lengths)
            responses = response.gather + int(segments.prompt_lengths.sum())
            prompt_keys = prompt.gather.view(prompt.rows, prompt.width)[prompt_of]
            keys = torch.cat([prompt_keys, responses.view(response.rows, response.width)], dim=1).flatten()
            unpack = torch.cat([prompt.slots, response.slots + prompt.rows * prompt.width])
            past = key_is_real[prompt_of][:, None, :].expand(-1, response.width, -1)
            own = torch.ones(response.width, response.width, dtype=torch.bool).tril().expand(response.rows, -1, -1)
            response_mask = torch.cat([past, own], dim=2)[:, None].to(device)
        return AttentionPlan(
            causal=segments.causal,
            prompts=prompt.gather.to(device),
            prompt_rows=prompt.rows,
            prompt_mask=key_is_real[:, None, None, :].to(device) if ragged and not segments.causal else None,
            responses=responses.to(device),
            response_rows=len(lengths),
            keys=keys.to(device),
            response_mask=response_mask,
            unpack=unpack.to(device),
        )


@dataclass(frozen=True)
class PackedTokens:
    """What travels through megatron-core's layers in the place of its `PackedSeqParams`.

    Any `qkv_format` but "thd" makes its self-attention apply rotary embeddings token by token, which is what packed
    tokens with explicit positions need. `visual_index` int64 [merged patches] says where images stand in T.
    """

    plan: AttentionPlan
    visual_index: Tensor | None = None
    qkv_format: str = "packed"


class PackedAttention(MegatronModule):
    """Core attention (softmax of scaled scores times values) of packed tokens; holds no parameters."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
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
        plan = packed_seq_params.plan
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        padded = self._attend(
            query, key, value, plan.prompts, plan.prompts, plan.prompt_rows, plan.prompt_mask, plan.causal
        )
        if plan.response_rows:
            responses = self._attend(
                query, key, value, plan.responses, plan.keys, plan.response_rows, plan.response_mask, False
            )
            padded = torch.cat([padded, responses])
        return padded.index_select(0, plan.unpack).unsqueeze(1)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Tensor,
        keys: Tensor,
        rows: int,
        mask: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """Attention of padded rows, back as [rows * width, heads * dim]."""
        q, k, v = (
            tokens.index_select(0, index).view(rows, -1, *tokens.shape[1:]).transpose(1, 2)
            for tokens, index in ((query, queries), (key, keys), (value, keys))
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return attended.transpose(1, 2).flatten(2).flatten(0, 1)
