"""A tiny but real Qwen3-VL as a Hugging Face folder, made from a seed: nothing is downloaded.

Every part of the architecture is there (ViT with merger and DeepStack, interleaved M-RoPE, grouped queries, q/k norm,
processor with chat template); only the sizes are small. `tools/mini_model.py` is the command.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copd_megatron.data.mini.tokenizer import (
    CHAT_TEMPLATE,
    END,
    END_OF_TEXT,
    IMAGE_PAD,
    MAX_LENGTH,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    character_tokenizer,
)
from copd_megatron.errors import WeightsError
from copd_megatron.files import sync_folder
from copd_megatron.randomness import seed_for

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeForConditionalGeneration,
        Qwen3VLProcessor,
    )


@dataclass(frozen=True)
class ModelSize:
    """The sizes that may be chosen; the defaults give 1.44 M parameters.

    With `patch` 4 and `merge` 2 the language model sees one token for each 8 x 8 pixels: one per handwritten digit.
    `deepstack` names the vision layers whose features are added to the first language layers. With `experts`, every
    language layer has so many in the place of its one MLP, of width `expert_mlp`, of which each token takes two. `init`
    is the standard deviation of the initial weights.
    """

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 384
    vision_hidden: int = 96
    vision_layers: int = 3
    vision_heads: int = 4
    vision_mlp: int = 192
    patch: int = 4
    merge: int = 2
    deepstack: tuple[int, ...] = (0,)
    experts: int = 0
    expert_mlp: int = 96
    init: float = 0.04

    def __post_init__(self) -> None:
        for total, part in (("heads", "kv_heads"), ("vision_hidden", "vision_heads")):
            if getattr(self, total) % getattr(self, part):
                raise WeightsError(
                    f"{total} {getattr(self, total)} is no multiple of {part} {getattr(self, part)}; choose one that is"
                )
        if self.head_dim % 2 or (self.vision_hidden // self.vision_heads) % 4:
            raise WeightsError(
                f"head_dim {self.head_dim} must be even, and vision_hidden / vision_heads "
                f"{self.vision_hidden // self.vision_heads} a multiple of 4: rotary embeddings turn pairs of channels"
            )
        if self.experts == 1 or self.experts < 0:
            raise WeightsError(f"experts {self.experts}: expected 0 for one MLP, or at least 2")
        if beyond := [layer for layer in self.deepstack if not 0 <= layer < self.vision_layers]:
            raise WeightsError(f"deepstack names vision layers {beyond}, but there are {self.vision_layers}")


TEMPORAL_PATCH = 2
VOCABULARY_MULTIPLE = 64
"""The embedding has spare rows up to a multiple of 64, as Qwen's has, so that tensor parallelism can divide it."""

LARGEST_IMAGE_TOKENS = 1024
"""A picture beyond this many merged patches is scaled down, one below a single merged patch is scaled up."""


def build(out: Path, seed: int, size: ModelSize | None = None) -> int:
    """Write the folder `out` (weights, configuration, generation defaults, processor) and return the parameter count.

    The same seed and size give the same bytes. The folder appears whole or not at all; `WeightsError` if `out` already
    has something in it.
    """
    size = size or ModelSize()
    if out.exists() and any(out.iterdir()):
        raise WeightsError(f"{out} is not empty: choose another folder or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    processor = build_processor(size)
    model = build_model(size, processor.tokenizer, seed)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        os.replace(temporary, out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return sum(parameter.numel() for parameter in model.parameters())


def build_processor(size: ModelSize) -> Qwen3VLProcessor:
    """Qwen3-VL's processor with the character tokenizer and this model's patch sizes."""
    from copd_megatron.policy.platform import declare_torchvision_schemas

    declare_torchvision_schemas()
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    one_token = (size.patch * size.merge) ** 2
    vision = {
        "patch_size": size.patch,
        "merge_size": size.merge,
        "temporal_patch_size": TEMPORAL_PATCH,
        "size": {"shortest_edge": one_token, "longest_edge": LARGEST_IMAGE_TOKENS * one_token},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**vision),
        tokenizer=character_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(**vision),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    size: ModelSize, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration:
    """Untrained float32 weights, drawn without touching torch's global random state."""
    import torch

    from copd_megatron.policy.platform import declare_torchvision_schemas

    declare_torchvision_schemas()
    from transformers import (
        GenerationConfig,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    token_id = tokenizer.convert_tokens_to_ids
    third = size.head_dim // 2 // 3
    text = {
        "vocab_size": -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "max_position_embeddings": MAX_LENGTH,
        "initializer_range": size.init,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [size.head_dim // 2 - 2 * third, third, third],
            "mrope_interleaved": True,
        },
        "bos_token_id": token_id(END_OF_TEXT),
        "eos_token_id": token_id(END),
    }
    vision = {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": size.vision_mlp,
        "num_heads": size.vision_heads,
        "patch_size": size.patch,
        "spatial_merge_size": size.merge,
        "temporal_patch_size": TEMPORAL_PATCH,
        "out_hidden_size": size.hidden,
        "num_position_embeddings": 100,
        "deepstack_visual_indexes": list(size.deepstack),
        "initializer_range": size.init,
    }
    kind: Any = (Qwen3VLConfig, Qwen3VLForConditionalGeneration)
    if size.experts:
        kind = (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration)
        text |= {
            "num_experts": size.experts,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": size.expert_mlp,
            "norm_topk_prob": True,
        }
    config = kind[0](
        text_config=text,
        vision_config=vision,
        image_token_id=token_id(IMAGE_PAD),
        video_token_id=token_id(VIDEO_PAD),
        vision_start_token_id=token_id(VISION_START),
        vision_end_token_id=token_id(VISION_END),
        tie_word_embeddings=False,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "mini model"))
        model = kind[1](config)
    model.generation_config = GenerationConfig(eos_token_id=token_id(END), pad_token_id=token_id(END_OF_TEXT))
    return model
