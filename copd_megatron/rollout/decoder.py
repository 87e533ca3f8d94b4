"""A few tokens at a time through a transformers language model, on the model's own weights.

transformers' own modules take many small operations around the matrix products, which decoding in small batches is
bound by. Here a layer takes few, and writes over what is no longer needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from copd_megatron.policy.elementwise import rotated
from copd_megatron.policy.products import product

if TYPE_CHECKING:
    from transformers import DynamicCache

VECTOR = 16
"""torch's softmax is scalar, and ten times slower, for rows shorter than this."""

FEW_KEYS = 128
"""Several queries' scores to no more keys than this are computed all at once; one query's always are."""


class Decoder:
    """Continues sequences as `model` would, on its weights: after they are overwritten it uses the new ones.

    `model` is the language model of any family: layers with full attention, biases and norms of queries and keys or
    not, and positions on one axis or on three.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._three_axes = hasattr(model.rotary_emb, "mrope_section")
        self._layers = [_Layer(layer) for layer in model.layers]

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [B, N, D] for positions int64 [B, N] of tokens that are not of an image."""
        embeddings = self._model.embed_tokens.weight
        cos, sin = self._model.rotary_emb(embeddings, positions.expand(3, -1, -1) if self._three_axes else positions)
        return cos, sin

    def extend(
        self,
        token_ids: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        cache: DynamicCache,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states [B, N, H] of `token_ids` int64 [B, N], which are appended to `cache`.

        `angles` [B, N, D] each are those of the tokens' positions. `mask` bool [B, S] tells which of the cached
        columns, the new ones included, are real; None if all are.
        """
        rows, new = token_ids.shape
        cos, sin = (wave.reshape(rows * new, 1, -1) for wave in angles)
        seen = seen_columns(new, cache.get_seq_length() + new, mask, token_ids.device)
        hidden = F.embedding(token_ids.flatten(), self._model.embed_tokens.weight)
        for index, layer in enumerate(self._layers):
            query, key, value = (states.unflatten(0, (rows, new)) for states in layer.project(hidden, cos, sin))
            keys, values = cache.update(key.transpose(1, 2), value.transpose(1, 2), index)
            hidden = layer.finish(hidden, attend(query, keys, values, layer.scale, seen))
        return _norm(self._model.norm, hidden).unflatten(0, (rows, new))


def seen_columns(new: int, length: int, mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """What each of the `new` last of `length` columns sees, as `attend` takes it."""
    if new == 1:
        if mask is None:
            return None
        seen = mask[:, None, :]
    else:
        columns = torch.arange(length, device=device)
        seen = (columns <= columns[-new:, None])[None]
        if mask is not None:
            seen = seen & mask[:, None, :]
    if new > 1 and length > FEW_KEYS:
        return seen
    return torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, seen: torch.Tensor | None
) -> torch.Tensor:
    """Attention: `query` [B, N, heads, D], `keys` and `values` [B, groups, S, D] to [B * N, heads * D].

    `seen` [B or 1, N, S] is bool, True where attention is allowed, or float32, 0 or -inf, and is then added to the
    scores; None if every query sees all. With few keys, two batched products take half the time of
    `scaled_dot_product_attention`; the heads that share a key are so many more queries to it.
    """
    rows, new, heads, size = query.shape
    groups, length = keys.shape[1:3]
    if seen is not None and seen.dtype is torch.bool:
        query = query.transpose(1, 2)
        attended = F.scaled_dot_product_attention(query, keys, values, seen[:, None], scale=scale, enable_gqa=True)
        return attended.transpose(1, 2).reshape(rows * new, heads * size)
    sharing = heads // groups
    asked = query.unflatten(2, (groups, sharing)).transpose(1, 2).reshape(rows * groups, new * sharing, size)
    scores = torch.bmm(asked, keys.flatten(0, 1).transpose(1, 2)).float().mul_(scale)
    if seen is not None:
        scores.view(rows, groups, new, sharing, length).add_(seen[:, None, :, None])
    if length < VECTOR:
        scores = F.pad(scores, (0, VECTOR - length), value=-torch.inf)
    weights = scores.softmax(-1)[..., :length].to(values.dtype)
    attended = torch.bmm(weights, values.flatten(0, 1)).view(rows, groups, new, sharing, size)
    return attended.transpose(1, 2).reshape(rows * new, heads * size)


class _Layer:
    """A decoder layer around its attention."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.scale: float = module.self_attn.scaling

    def project(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [T, heads, D], rotated keys and values [T, groups, D], of `hidden` [T, H]."""
        attention = self.module.self_attn
        normed = _norm(self.module.input_layernorm, hidden)
        query, key, value = (
            _linear(linear, normed).unflatten(1, (-1, attention.head_dim))
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        if hasattr(attention, "q_norm"):
            query, key = _norm(attention.q_norm, query), _norm(attention.k_norm, key)
        return rotated(query, cos, sin, 1), rotated(key, cos, sin, 1), value

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """`hidden` [T, H] after the attention's output [T, heads * D] and the MLP have been added."""
        module, mlp = self.module, self.module.mlp
        hidden = _linear(module.self_attn.o_proj, attended).add_(hidden)
        normed = _norm(module.post_attention_layernorm, hidden)
        if hasattr(mlp, "experts"):
            return hidden + mlp(normed[:, None])[:, 0]
        gated = F.silu(_linear(mlp.gate_proj, normed), inplace=True).mul_(_linear(mlp.up_proj, normed))
        return _linear(mlp.down_proj, gated).add_(hidden)


def _norm(module: Any, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _linear(module: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return product(x, module.weight, module.bias)
