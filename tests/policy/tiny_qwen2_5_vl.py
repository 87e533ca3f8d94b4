"""A tiny random Qwen2.5-VL, conversations about images and videos that windows do not divide, its published weights."""

from __future__ import annotations

from typing import Any

import torch
from tiny_qwen3_vl import END, IMAGE, MERGE, START, VIDEO, VOCAB, Video, conversation

TOKENS_PER_SECOND = 4

TEXT = [conversation(1, 9, [5, 3])]
ONE_IMAGE = [conversation(2, 5, [4, 6], [(1, 4, 8)])]
SEVERAL_SIZES = [
    conversation(3, 6, [5], [(1, 14, 10)]),
    conversation(4, 4, [3, 7], [(1, 2, 2)]),
    conversation(5, 5, [2], [(1, 10, 6)]),
]
FRAMES = [conversation(9, 5, [4], [(2, 8, 10)])]
VIDEOS = [
    # Half a second a frame are two positions; 0.7 are 2.8, and frames end behind the text that follows them.
    conversation(10, 4, [3, 5], [Video(3, 4, 4, 0.5)], TOKENS_PER_SECOND),
    conversation(11, 3, [4], [(1, 4, 6), Video(7, 2, 2, 0.7), (1, 2, 2), Video(2, 8, 10, 1 / 3)], TOKENS_PER_SECOND),
]
MIXED = [
    *TEXT,
    *VIDEOS,
    conversation(6, 7, [6, 1, 4], [(1, 4, 8), (1, 2, 2), (1, 6, 18)]),
    conversation(7, 12, [1, 8, 2, 5]),
    *SEVERAL_SIZES,
]


def config(tied: bool = False, full: tuple[int, ...] = (1,), window: int = 24, **text: Any) -> Any:
    """The configuration of a model whose windows are 3 × 3 merged patches."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 120,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "intermediate_size": 148,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "mrope_section": [2, 5, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
            **text,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 72,
            "intermediate_size": 100,
            "num_heads": 6,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
            "tokens_per_second": TOKENS_PER_SECOND,
            "window_size": window,
            "fullatt_block_indexes": list(full),
            "out_hidden_size": 120,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )


def published(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A module's tensors (weights or gradients) under the names under which Qwen publishes them."""
    places = {"model.language_model.": "model.", "model.visual.": "visual."}
    found = {}
    for name, tensor in named.items():
        start = next((place for place in places if name.startswith(place)), "")
        found[places.get(start, "") + name.removeprefix(start)] = tensor
    return found
