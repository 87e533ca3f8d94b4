"""A Hugging Face Qwen3-VL configuration as what megatron-core needs to know."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.policy import platform
from copd_megatron.policy.layout import Layout

Precision = Literal["fp32", "bf16"]

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""Hugging Face's names of activations."""


@dataclass(frozen=True)
class VisionSettings:
    """What the vision tower needs beside its `TransformerConfig`. Sizes count pixels, patches, frames or features."""

    patch_features: int
    patch_shape: tuple[int, int, int, int]
    merge: int
    position_grid: int
    rope_theta: float
    deepstack_layers: tuple[int, ...]
    out_hidden_size: int


@dataclass(frozen=True)
class TextSettings:
    """What the language model needs beside its `TransformerConfig`."""

    vocab_size: int
    padded_vocab_size: int
    tied: bool
    rope_theta: float
    mrope_section: tuple[int, int, int]


@dataclass(frozen=True)
class Qwen3VLSettings:
    """One model on one layout: settings and the `TransformerConfig`s of both transformers."""

    hf: Qwen3VLConfig
    text: TextSettings
    vision: VisionSettings
    text_config: TransformerConfig
    vision_config: TransformerConfig


def load_config(source: str | os.PathLike[str] | Qwen3VLConfig) -> Qwen3VLConfig:
    """The configuration in a Hugging Face folder (or the one given). WeightsError if it is not a dense Qwen3-VL."""
    if isinstance(source, Qwen3VLConfig):
        return source
    content, _ = Qwen3VLConfig.get_config_dict(source, local_files_only=True)
    if content.get("model_type") != Qwen3VLConfig.model_type:
        raise WeightsError(
            f"{source}: config.json says model_type {content.get('model_type')!r}; the policy can be "
            f"{Qwen3VLConfig.model_type!r} only"
        )
    config: Qwen3VLConfig = Qwen3VLConfig.from_dict(content)
    return config


def settings(hf: Qwen3VLConfig, layout: Layout, precision: Precision, recompute: bool = False) -> Qwen3VLSettings:
    """Everything the model is built from; `recompute` keeps only the layers' inputs for the backward pass.

    ConfigError if the model or the layout is not supported.
    """
    text, vision = hf.text_config, hf.vision_config
    rope = text.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(
            f"text_config.rope_parameters: rope_type {rope['rope_type']!r} is not supported, only 'default'"
        )
    if text.attention_bias:
        raise ConfigError("text_config.attention_bias is true; a Qwen3-VL language model has no attention biases")
    for part, activation in (("text_config", text.hidden_act), ("vision_config", vision.hidden_act)):
        if activation not in ACTIVATIONS:
            raise ConfigError(f"{part}.hidden_act is {activation!r}; known are {', '.join(ACTIVATIONS)}")
    _check_division(hf, layout)
    deepstack = tuple(vision.deepstack_visual_indexes)
    return Qwen3VLSettings(
        hf=hf,
        text=TextSettings(
            vocab_size=text.vocab_size,
            padded_vocab_size=-(-text.vocab_size // layout.tp) * layout.tp,
            tied=hf.tie_word_embeddings,
            rope_theta=rope["rope_theta"],
            mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
        ),
        vision=VisionSettings(
            patch_features=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
            patch_shape=(vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size),
            merge=vision.spatial_merge_size,
            position_grid=round(vision.num_position_embeddings**0.5),
            rope_theta=vision.rope_parameters["rope_theta"],
            deepstack_layers=deepstack,
            out_hidden_size=vision.out_hidden_size,
        ),
        text_config=_transformer(
            layout,
            precision,
            recompute,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.intermediate_size,
            num_attention_heads=text.num_attention_heads,
            num_query_groups=text.num_key_value_heads,
            kv_channels=text.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=text.rms_norm_eps,
            gated_linear_unit=True,
            activation_func=ACTIVATIONS[text.hidden_act],
            # The layers' own name for "the spec brings the activation": ours is SwiGLU.
            use_te_activation_func=text.hidden_act == "silu",
            add_bias_linear=False,
            qk_layernorm=True,
            init_method_std=text.initializer_range,
            pipeline_model_parallel_size=layout.pp,
            # Micro-batches differ in length; the dispatcher is named because its default refuses that, even unused.
            variable_seq_lengths=layout.pp > 1,
            moe_token_dispatcher_type="alltoall",
        ),
        vision_config=_transformer(
            layout,
            precision,
            recompute,
            num_layers=vision.depth,
            hidden_size=vision.hidden_size,
            ffn_hidden_size=vision.intermediate_size,
            num_attention_heads=vision.num_heads,
            normalization="LayerNorm",
            layernorm_epsilon=1e-6,
            activation_func=ACTIVATIONS[vision.hidden_act],
            add_bias_linear=True,
            init_method_std=vision.initializer_range,
        ),
    )


def _check_division(hf: Qwen3VLConfig, layout: Layout) -> None:
    """ConfigError where the layout does not divide the model."""
    text, vision = hf.text_config, hf.vision_config
    for name, size in (
        ("text_config.num_attention_heads", text.num_attention_heads),
        ("text_config.num_key_value_heads", text.num_key_value_heads),
        ("text_config.intermediate_size", text.intermediate_size),
        ("vision_config.num_heads", vision.num_heads),
        ("vision_config.intermediate_size", vision.intermediate_size),
    ):
        if size % layout.tp:
            raise ConfigError(f"parallel.tp = {layout.tp} does not divide {name} = {size}; choose a divisor")
    if text.num_hidden_layers % layout.pp:
        raise ConfigError(
            f"parallel.pp = {layout.pp} does not divide text_config.num_hidden_layers = {text.num_hidden_layers}"
        )
    first_stage, taps = text.num_hidden_layers // layout.pp, len(vision.deepstack_visual_indexes)
    if first_stage < taps:
        raise ConfigError(
            f"parallel.pp = {layout.pp} leaves {first_stage} layers to the first stage, but DeepStack adds image "
            f"features after the first {taps}; choose a smaller pp"
        )


def _transformer(layout: Layout, precision: Precision, recompute: bool, **model: object) -> TransformerConfig:
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
        deallocate_pipeline_outputs=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of parameters and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
