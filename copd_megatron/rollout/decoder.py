"""One token at a time through a transformers language model, on the model's own weights.

Decoding in small batches is bound by the number of operations, not by their size. Here a layer takes the fewest that
torch has: one product for queries, keys and values, one for gate and up, one norm and one rotation for all heads, and
residuals added by the products that make them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from copd_megatron.policy.elementwise import rotated

if TYPE_CHECKING:
    from transformers import DynamicCache
    from transformers.models.qwen3_vl.modeling_qwen3_vl import (
        Qwen3VLTextDecoderLayer,
        Qwen3VLTextModel,
        Qwen3VLTextRMSNorm,
    )

VECTOR = 16
"""torch's softmax is scalar, and ten times slower, for rows shorter than this."""


class Decoder:
    """The decoding step of `model`, whose weights it shares: after the model's are overwritten it uses the new ones."""

    def __init__(self, model: Qwen3VLTextModel) -> None:
        self._model = model
        self._layers = [_Layer.of(layer) for layer in model.layers]

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, S, D] for positions int64 [B, S] of tokens that are not of an image."""
        embeddings = self._model.embed_tokens.weight
        cos, sin = self._model.rotary_emb(embeddings, positions.expand(3, -1, -1))
        return cos, sin

    def step(
        self,
        token_ids: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: DynamicCache,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states [B, H] of `token_ids` int64 [B], which are appended to `cache`.

        `angles` [B, D] each are those of the tokens' positions. `mask` bool [B, S] tells which of the cached columns,
        the new one included, are real; None if all are.
        """
        cos, sin = (wave[:, None] for wave in angles)
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)[:, None, None]
        hidden = F.embedding(token_ids, self._model.embed_tokens.weight)
        for index, layer in enumerate(self._layers):
            query, key, value = layer.project(hidden, cos, sin)
            keys, values = cache.update(key, value, index)
            hidden = layer.finish(hidden, attend(query, keys, values, layer.scale, bias))
        return _norm(self._model.norm, hidden)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> torch.Tensor:
    """Attention of one query per row: `query` [B, heads, D], `keys` and `values` [B, groups, S, D] to [B, heads * D].

    `bias` float32 [B, 1, 1, S], 0 or -inf, is added to the scores. For one query, two batched products take half the
    time of `scaled_dot_product_attention`; the heads that share a key are so many queries to it.
    """
    rows, heads, size = query.shape
    groups, length = keys.shape[1:3]
    asked = query.reshape(rows * groups, heads // groups, size)
    scores = torch.bmm(asked, keys.flatten(0, 1).transpose(1, 2)).float().mul_(scale)
    if bias is not None:
        scores.view(rows, groups, -1, length).add_(bias)
    if length < VECTOR:
        scores = F.pad(scores, (0, VECTOR - length), value=-torch.inf)
    weights = scores.softmax(-1)[..., :length].to(values.dtype)
    return torch.bmm(weights, values.flatten(0, 1)).view(rows, heads * size)


@dataclass(frozen=True)
class _Joint:
    """Linear layers of the same input as one; the layers' own parameters are views of it."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @staticmethod
    def of(*parts: torch.nn.Linear) -> _Joint:
        weight = torch.cat([part.weight.data for part in parts])
        sizes = [len(part.weight) for part in parts]
        for part, view in zip(parts, weight.split(sizes), strict=True):
            part.weight.data = view
        if parts[0].bias is None:
            return _Joint(weight, None)
        bias = torch.cat([part.bias.data for part in parts])
        for part, view in zip(parts, bias.split(sizes), strict=True):
            part.bias.data = view
        return _Joint(weight, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class _Layer:
    """A decoder layer around its attention. One with experts has no `gate_up`: its MLP is the module's own."""

    module: Qwen3VLTextDecoderLayer
    qkv: _Joint
    gate_up: _Joint | None
    heads: int
    groups: int
    size: int
    scale: float

    @staticmethod
    def of(module: Qwen3VLTextDecoderLayer) -> _Layer:
        attention, mlp = module.self_attn, module.mlp
        size = attention.head_dim
        return _Layer(
            module=module,
            qkv=_Joint.of(attention.q_proj, attention.k_proj, attention.v_proj),
            gate_up=_Joint.of(mlp.gate_proj, mlp.up_proj) if hasattr(mlp, "gate_proj") else None,
            heads=attention.q_proj.out_features // size,
            groups=attention.k_proj.out_features // size,
            size=size,
            scale=attention.scaling,
        )

    def project(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [B, heads, D], and rotated keys and values [B, groups, 1, D], of `hidden` [B, H]."""
        attention = self.module.self_attn
        joint = self.qkv(_norm(self.module.input_layernorm, hidden)).view(len(hidden), -1, self.size)
        query, key, value = joint.split([self.heads, self.groups, self.groups], dim=1)
        query = rotated(_norm(attention.q_norm, query), cos, sin, 1)
        key = rotated(_norm(attention.k_norm, key), cos, sin, 1)
        return query, key.unsqueeze(2), value.unsqueeze(2)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """`hidden` [B, H] after the attention's output [B, heads * D] and the MLP have been added."""
        module = self.module
        hidden = _added(hidden, attended, module.self_attn.o_proj)
        normed = _norm(module.post_attention_layernorm, hidden)
        if self.gate_up is None:
            return hidden + module.mlp(normed[:, None])[:, 0]
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return _added(hidden, F.silu(gate).mul_(up), module.mlp.down_proj)


def _norm(module: Qwen3VLTextRMSNorm, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _added(residual: torch.Tensor, x: torch.Tensor, linear: torch.nn.Linear) -> torch.Tensor:
    added = torch.addmm(residual, x, linear.weight.t())
    return added if linear.bias is None else added.add_(linear.bias)
