"""Tiny random models that take text alone, and their weights as Qwen publishes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tiny_qwen3_vl import VOCAB, conversation

TEXT = [conversation(1, 9, [5, 3])]
SHARED = [conversation(7, 12, [1, 8, 2, 5]), *TEXT, conversation(8, 3, [7])]
"""Prompts with several responses each, packed together."""


def dense(tied: bool = True, **options: Any) -> Any:
    """The configuration of a model whose sizes have little in common."""
    from transformers import Qwen3Config

    return Qwen3Config(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 104,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 20,
            "intermediate_size": 148,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
            "tie_word_embeddings": tied,
            **options,
        }
    )


def sparse(layers_without: Sequence[int] = (), tied: bool = False, **options: Any) -> Any:
    """The configuration of a model like `dense`'s with experts in all layers but `layers_without`."""
    from transformers import Qwen3MoeConfig

    like = dense(tied).to_dict()
    kept = {key: like[key] for key in like if key not in ("model_type", "layer_types", "max_window_layers")}
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        # Half of the hidden size: an expert's gate and up projection together are square.
        "moe_intermediate_size": 52,
        "norm_topk_prob": True,
        "mlp_only_layers": list(layers_without),
    }
    return Qwen3MoeConfig(**{**kept, **experts, **options})


def published(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors (weights or gradients) under the names, and in the parts, in which Qwen publishes them."""
    found = {}
    for name, tensor in named.items():
        stack = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        if stack is None:
            found[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            parts = {"gate": matrix[:52], "up": matrix[52:]} if stack[2] == "gate_up" else {"down": matrix}
            for projection, part in parts.items():
                found[f"{stack[1]}.{number}.{projection}_proj.weight"] = part
    return found
