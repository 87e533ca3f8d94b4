"""Of `tools/gpu_check.py`: our packed attention beside Transformer Engine's, and a linear layer under each FP8 recipe.

Both are compared with float32 before they are timed.
"""

from __future__ import annotations

from typing import Any

import torch
from gpu_check_timing import NotRun, Sizes, seconds_of
from torch import Tensor

from copd_megatron.policy import platform
from copd_megatron.policy.attention import AttentionPlan, PackedAttention, PackedTokens
from copd_megatron.policy.fp8 import NEEDS, Recipe, fp8_options, why_not
from copd_megatron.policy.packed import Segments

ATTENTION_TOLERANCE = 0.02
"""Largest relative difference (Frobenius norm) of bf16 attention or its gradients from float32."""
LINEAR_TOLERANCE = 0.10
"""The same of an FP8 product: E5M2 has two bits of mantissa."""


def uneven_lengths(count: int, longest: int) -> list[int]:
    """Lengths from an eighth of `longest` to `longest`, evenly spread, in an order that is not sorted."""
    step = (longest - longest // 8) / max(1, count - 1)
    spread = [max(1, round(longest - number * step)) for number in range(count)]
    return spread[::2] + spread[1::2]


def reference(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention in float32, sequence by sequence: [T, heads, dim] to the same; scores are materialised."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(part.float().split(lengths) for part in (query, key, value)), strict=True):
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


class Packed:
    """Ours. `split`: a quarter of each sequence is a prompt, the rest a response to it, which is how the policy trains;
    all prompts then come before all responses (`order`), and responses attend under a mask."""

    def __init__(self, lengths: list[int], device: torch.device, split: bool) -> None:
        nothing = torch.empty(0, dtype=torch.int64)
        whole = torch.tensor(lengths)
        segments, self.order = Segments(whole, nothing, nothing), torch.arange(sum(lengths))
        if split:
            prompts = (whole // 4).clamp(min=1)
            segments = Segments(prompts, whole - prompts, torch.arange(len(lengths)))
            first = (whole.cumsum(0) - whole).repeat_interleave(whole)
            in_prompt = torch.arange(sum(lengths)) - first < prompts.repeat_interleave(whole)
            self.order = torch.cat([in_prompt.nonzero()[:, 0], (~in_prompt).nonzero()[:, 0]])
        self.packed = PackedTokens(AttentionPlan.of(segments, device))
        self.attention = PackedAttention()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, heads, dim] to the same."""
        q, k, v = (part.unsqueeze(1) for part in (query, key, value))
        output: Tensor = self.attention(q, k, v, packed_seq_params=self.packed)
        return output.view_as(query)


class TransformerEngine:
    """Transformer Engine's, on packed sequences (`thd`)."""

    def __init__(self, lengths: list[int], device: torch.device, config: Any) -> None:
        if not platform.has_transformer_engine():
            raise NotRun("needs a GPU and Transformer Engine")
        from megatron.core.extensions.transformer_engine import TEDotProductAttention
        from megatron.core.packed_seq_params import PackedSeqParams
        from megatron.core.transformer.enums import AttnMaskType

        self.order = torch.arange(sum(lengths))
        self.mask = AttnMaskType.padding_causal
        self.attention = TEDotProductAttention(config, 1, self.mask, "self").to(device)
        ends = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        self.params = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[T, heads, dim] to the same."""
        output: Tensor = self.attention(query, key, value, None, self.mask, packed_seq_params=self.params)
        return output.reshape(query.shape)


def attention_part(sizes: Sizes, device: torch.device, config: Any, which: str) -> dict[str, Any]:
    """`ours`, `ours_responses` or `transformer_engine`: error against float32, then milliseconds of forward and
    backward on the same sequences."""
    shape, lengths = sizes.shape, uneven_lengths(sizes.sequences, sizes.length)
    attend: Packed | TransformerEngine
    if which == "transformer_engine":
        attend = TransformerEngine(lengths, device, config)
    else:
        attend = Packed(lengths, device, split=which == "ours_responses")
    order = attend.order.to(device)
    draw = torch.Generator(device="cpu").manual_seed(0)
    in_sequence = [
        torch.randn(sum(lengths), heads, shape.head_dim, generator=draw).to(device, torch.bfloat16).requires_grad_()
        for heads in (shape.heads, shape.groups, shape.groups)
    ]
    weight = torch.randn(in_sequence[0].shape, generator=draw).to(device, torch.bfloat16)
    query, key, value = in_sequence
    whole = reference(query, key, value, lengths)
    slopes = torch.autograd.grad(whole, in_sequence, weight.float())
    expected, weight, *expected_grads = (part.detach()[order] for part in (whole, weight, *slopes))
    inputs = [part.detach()[order].requires_grad_() for part in in_sequence]
    output = attend(*inputs)
    grads = torch.autograd.grad(output, inputs, weight)
    errors = {
        name: relative(found, right)
        for name, found, right in zip(
            ("output", "query", "key", "value"), (output, *grads), (expected, *expected_grads), strict=True
        )
    }
    if not max(errors.values()) <= ATTENTION_TOLERANCE:
        raise RuntimeError(f"not the attention of float32: {errors}, expected ≤ {ATTENTION_TOLERANCE:g}")

    def both(_: int) -> None:
        torch.autograd.grad(attend(*inputs), inputs, weight)

    spent = seconds_of(both, sizes.repeats, sizes.warm_up, device)
    operations = sum(6.0 * 2 * shape.heads * shape.head_dim * length**2 / 2 for length in lengths)
    return {
        "lengths": lengths,
        "relative_error": errors,
        "milliseconds": 1e3 * spent,
        "tflops": operations / spent / 1e12,
    }


def linear_part(recipe: Recipe, sizes: Sizes, device: torch.device) -> dict[str, Any]:
    """Transformer Engine's linear layer, forward and backward, under the recipe against float32 on the same values."""
    missing = why_not(recipe)
    if missing:
        raise NotRun(missing)
    import transformer_engine.pytorch as te
    from megatron.core.fp8_utils import get_fp8_recipe
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape, tokens = sizes.shape, max(NEEDS[recipe].tokens, sizes.length)
    options = fp8_options(recipe, layers=1, bf16_layers_at_start=0, bf16_layers_at_end=0)
    config = TransformerConfig(num_layers=1, hidden_size=shape.hidden, num_attention_heads=shape.heads, **options)
    draw = torch.Generator(device="cpu").manual_seed(0)
    x, grad = (
        torch.randn(tokens, width, generator=draw).to(device, torch.bfloat16) for width in (shape.hidden, shape.mlp)
    )
    layer = te.Linear(shape.hidden, shape.mlp, bias=False, params_dtype=torch.bfloat16, device=device)
    x.requires_grad_()
    for _ in range(2):  # the first pass of delayed scaling has no history
        layer.zero_grad()
        x.grad = None
        with te.fp8_autocast(enabled=True, fp8_recipe=get_fp8_recipe(config)):
            output = layer(x)
        output.backward(grad)
    weight = layer.weight.detach().float()
    right = {
        "output": x.float() @ weight.T,
        "grad_input": grad.float() @ weight,
        "grad_weight": grad.float().T @ x.float(),
    }
    found = {"output": output, "grad_input": x.grad, "grad_weight": layer.weight.grad}
    errors = {name: relative(found[name], right[name]) for name in right}
    if not max(errors.values()) <= LINEAR_TOLERANCE:
        raise RuntimeError(f"not the product of float32: {errors}, expected ≤ {LINEAR_TOLERANCE:g}")
    return {"shape": [tokens, shape.hidden, shape.mlp], "relative_error": errors}


def relative(found: Tensor, right: Tensor) -> float:
    """‖found − right‖ / ‖right‖."""
    with torch.no_grad():
        return float((found.float() - right.float()).norm() / right.float().norm())
