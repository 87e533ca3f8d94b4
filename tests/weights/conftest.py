"""Tiny Qwen3-VL models with random weights, as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_megatron.policy.platform import declare_torchvision_schemas

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END = 40, 36, 37, 38, 39


@pytest.fixture(scope="session")
def build_model() -> Callable[..., Any]:
    """(seed, experts in every layer) -> a transformers Qwen3-VL of about 20,000 parameters."""
    declare_torchvision_schemas()
    import transformers

    def build(seed: int, experts: int = 0) -> Any:
        kind = "Qwen3VLMoe" if experts else "Qwen3VL"
        sparse = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        config = getattr(transformers, f"{kind}Config")(
            text_config={
                **(sparse if experts else {}),
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "max_position_embeddings": 64,
                "initializer_range": 0.2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "mrope_section": [2, 1, 1],
                    "mrope_interleaved": True,
                },
            },
            vision_config={
                "depth": 2,
                "hidden_size": 24,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 2,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
                "initializer_range": 0.2,
            },
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return getattr(transformers, f"{kind}ForConditionalGeneration")(config).float().eval()

    return build


@pytest.fixture
def save_model(build_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """(seed, dtype, experts) -> the model's Hugging Face folder, with a tokenizer file and a chat template."""

    def save(seed: int, dtype: torch.dtype = torch.float32, experts: int = 0) -> Path:
        folder = tmp_path / f"model{seed}"
        build_model(seed, experts).to(dtype).save_pretrained(folder)
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        return folder

    return save
