"""What the benchmarks of an update share: a random Qwen3-VL of any size, and sequences of one length to train it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from copd_megatron.objectives.vocabulary import Vocabulary, token_logprobs
from copd_megatron.policy.batching import Sample
from copd_megatron.policy.packed import Signals
from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.randomness import generator
from copd_megatron.rollout.types import Prompt, Rollout

RESERVED = 4
"""The last ids of the vocabulary mark images; sequences do without them."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a language model. The defaults have 1.05 M parameters with embedding and output layer."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    groups: int = 2
    head_dim: int = 32
    mlp: int = 384
    vocabulary: int = 1024

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with, the output layer among them."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.groups)
        return self.layers * (attention + 3 * self.hidden * self.mlp) + self.hidden * self.vocabulary

    def flops(self, lengths: list[int]) -> float:
        """Floating-point operations of forward and backward over sequences of these lengths: 6 per parameter and
        token, and causal attention (half of the score matrix, 2 products of 2 operations, 3 passes)."""
        attention = sum(6.0 * self.layers * self.heads * self.head_dim * length**2 for length in lengths)
        return 6.0 * self.matrix_parameters * sum(lengths) + attention


def write_model(folder: Path, shape: Shape, seed: int = 0) -> None:
    """A Hugging Face folder of random float32 weights; the vision tower is as small as one can be."""
    config = model_config(shape)
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen3VLForConditionalGeneration(config).save_pretrained(folder)


def model_config(shape: Shape) -> Any:
    """The configuration of that model."""
    declare_torchvision_schemas()
    from transformers import Qwen3VLConfig

    third = shape.head_dim // 2 // 3
    return Qwen3VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups,
            "head_dim": shape.head_dim,
            "max_position_embeddings": 1 << 18,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [shape.head_dim // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 4,
            "patch_size": 2,
            "spatial_merge_size": 1,
            "temporal_patch_size": 1,
            "out_hidden_size": shape.hidden,
            "num_position_embeddings": 4,
            "deepstack_visual_indexes": [],
        },
        image_token_id=shape.vocabulary - 1,
        video_token_id=shape.vocabulary - 2,
        vision_start_token_id=shape.vocabulary - 3,
        vision_end_token_id=shape.vocabulary - 4,
        tie_word_embeddings=False,
        dtype="float32",
    )


def make_samples(count: int, length: int, vocabulary: int, seed: int = 0) -> list[Sample]:
    """`count` sequences of which the policy computes `length` tokens each and predicts as many.

    A prompt of one token and a response of `length`, whose last token is only predicted. No two share a prompt.
    """
    draw = generator(seed, "benchmark sequences")
    ids = torch.randint(0, vocabulary - RESERVED, (count, length + 1), generator=draw)
    return samples_of(ids.tolist())


def samples_of(rows: Sequence[Sequence[int]]) -> list[Sample]:
    """Sequences of token ids as samples: the first id is the prompt, the others are predicted, the last is no input."""
    return [
        Sample(
            Rollout(
                prompt=Prompt(f"bench:{number}", "text", (row[0],), "", "exact", ""),
                token_ids=tuple(row[1:]),
                logprobs=torch.zeros(len(row) - 1),
                finish="length",
                policy_version=0,
                text="",
            )
        )
        for number, row in enumerate(rows)
    ]


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, vocabulary: Vocabulary | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Mean over sequences of the mean over tokens of -log p(target); `logits` [R, V] or this rank's columns of them."""
    return -(signals.weight * token_logprobs(logits, targets, 1.0, vocabulary)).sum(), {}
