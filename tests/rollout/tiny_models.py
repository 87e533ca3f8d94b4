"""Sizes of the models that the engine's tests run, and folders with random weights and a character tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from copd_megatron.policy.platform import declare_torchvision_schemas

SPECIAL = ["<pad>", "<end>", "<vision>", "</vision>", "<image>", "<video>"]
PAD, END, VISION, VISION_END, IMAGE, VIDEO = range(6)
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz+-*=<>?:, ."
PATCH, MERGE, FRAMES = 4, 2, 2


TEXT = {
    "vocab_size": len(SPECIAL) + len(CHARACTERS),
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Large weights, so that distributions are peaked and differ from one position to the next.
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "eos_token_id": END,
    "pad_token_id": PAD,
    "bos_token_id": PAD,
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "mlp_only_layers": [1],
    "norm_topk_prob": True,
}


def save(folder: Path, config: Any, seed: int = 0) -> Path:
    """Write a Hugging Face folder with `config`, random weights and tokenizer."""
    declare_torchvision_schemas()
    import transformers
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if hasattr(config, "vision_config"):
        vision = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": FRAMES}
        names = ("image_token", "video_token", "vision_bos_token", "vision_eos_token")
        roles = dict(zip(names, ("<image>", "<video>", "<vision>", "</vision>"), strict=True))
        family = "Qwen2_5_VL" if config.model_type == "qwen2_5_vl" else "Qwen3VL"
        videos = "Qwen2VLVideoProcessor" if config.model_type == "qwen2_5_vl" else "Qwen3VLVideoProcessor"
        getattr(transformers, f"{family}Processor")(
            image_processor=transformers.Qwen2VLImageProcessor(**vision),
            tokenizer=transformers.PreTrainedTokenizerFast(
                tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", extra_special_tokens=roles
            ),
            video_processor=getattr(transformers, videos)(**vision),
        ).save_pretrained(folder)
    else:
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", additional_special_tokens=SPECIAL[2:]
        ).save_pretrained(folder)
    kind = type(config).__name__.removesuffix("Config")
    task = "ForConditionalGeneration" if hasattr(config, "vision_config") else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(transformers, kind + task)(config).float().save_pretrained(folder)
    return folder


def build_folder(
    folder: Path, tied: bool, seed: int = 0, experts: bool = False, deepstack: int = 1, dense: Sequence[int] = (1,)
) -> Path:
    """A Qwen3-VL; with `experts`, in all but the `dense` ones of three layers; features of its first `deepstack` vision
    layers go up."""
    declare_torchvision_schemas()
    import transformers

    config = getattr(transformers, "Qwen3VLMoeConfig" if experts else "Qwen3VLConfig")(
        text_config={
            **TEXT,
            **(
                {key: value for key, value in EXPERTS.items() if key != "norm_topk_prob"}
                | {"mlp_only_layers": list(dense)}
                if experts
                else {}
            ),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": max(2, deepstack),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(deepstack)),
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    return save(folder, config, seed)


def config_of(family: str) -> Any:
    """Of `qwen3`, `qwen3_tied`, `qwen3_moe`, `qwen2_5_vl` and `qwen2_5_vl_tied`."""
    import transformers

    if family.startswith("qwen2_5_vl"):
        return qwen2_5_vl(tied=family.endswith("tied"))
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**TEXT, **EXPERTS)
    return transformers.Qwen3Config(**TEXT, tie_word_embeddings=family.endswith("tied"))


def qwen2_5_vl(tied: bool, patch: int = PATCH) -> Any:
    """Windows are of 2 × 2 merged patches; images of `prompts` are larger."""
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config={
            **{key: value for key, value in TEXT.items() if key != "head_dim"},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 1]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 44,
            "num_heads": 4,
            "patch_size": patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "window_size": 2 * MERGE * patch,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 48,
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
