"""What the decoder and the vision towers of all families share: a `TransformerConfig` for any machine."""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from copd_megatron.policy import platform
from copd_megatron.policy.layout import Layout

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""Hugging Face's names of activations."""


def transformer(layout: Layout, precision: Precision, recompute: Recompute, **model: object) -> TransformerConfig:
    """A `TransformerConfig` without dropout and without kernels that only exist for CUDA."""
    dtype = torch_dtype(precision)
    return TransformerConfig(
        **model,  # type: ignore[arg-type]
        tensor_model_parallel_size=layout.tp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=not platform.on_gpu(),
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],
        # Interleaved stages free what they have begun to send: CUDA's streams keep it until it is sent, gloo does not.
        deallocate_pipeline_outputs=platform.on_gpu(),
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_modules=["core_attn"] if recompute == "selective" else None,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )


def gated(activation: str) -> dict[str, object]:
    """The fields of a gated MLP with Hugging Face's `activation`."""
    return {
        "gated_linear_unit": True,
        "activation_func": ACTIVATIONS[activation],
        # The layers' own name for "the spec brings the activation": ours is SwiGLU.
        "use_te_activation_func": activation == "silu",
    }


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of parameters and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
