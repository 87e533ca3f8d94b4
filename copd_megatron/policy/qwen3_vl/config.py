"""A Hugging Face Qwen3-VL configuration, dense or with experts, as what megatron-core needs to know."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig

from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.policy import platform
from copd_megatron.policy.fp8 import NO_FP8, Fp8Choice, fp8_options
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl.moe import moe_fields

HfConfig: TypeAlias = Qwen3VLConfig | Qwen3VLMoeConfig

Precision = Literal["fp32", "bf16"]
Recompute = Literal["none", "selective", "full"]

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
    """One model on one layout: settings and the `TransformerConfig`s of both transformers.

    `family` is the name of the weight table, and of the model's kind in its config.json.
    """

    family: str
    hf: HfConfig
    text: TextSettings
    vision: VisionSettings
    text_config: TransformerConfig
    vision_config: TransformerConfig


def load_config(source: str | os.PathLike[str] | HfConfig) -> HfConfig:
    """The configuration in a Hugging Face folder (or the one given). WeightsError if it is not a Qwen3-VL."""
    if isinstance(source, (Qwen3VLConfig, Qwen3VLMoeConfig)):
        return source
    content, _ = Qwen3VLConfig.get_config_dict(source, local_files_only=True)
    for kind in (Qwen3VLConfig, Qwen3VLMoeConfig):
        if content.get("model_type") == kind.model_type:
            config: HfConfig = kind.from_dict(content)
            return config
    raise WeightsError(
        f"{source}: config.json says model_type {content.get('model_type')!r}; the policy can be "
        f"{Qwen3VLConfig.model_type!r} or {Qwen3VLMoeConfig.model_type!r}"
    )


def settings(
    hf: HfConfig,
    layout: Layout,
    precision: Precision,
    recompute: Recompute = "none",
    fp8: Fp8Choice = NO_FP8,
) -> Qwen3VLSettings:
    """Everything the model is built from.

    `recompute` computes again in the backward pass: the core attention (`selective`) or all layers (`full`). `fp8` is
    for the language model's layers. ConfigError if the model or the layout is not supported.
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
    experts = moe_fields(text, layout) if isinstance(hf, Qwen3VLMoeConfig) else {}
    deepstack = tuple(vision.deepstack_visual_indexes)
    return Qwen3VLSettings(
        family=hf.model_type,
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
            virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
            # Two stages that are each other's next and previous one would mix up what they send both ways at once.
            overlap_p2p_comm=layout.vpp > 1,
            batch_p2p_comm=layout.vpp == 1,
            context_parallel_size=layout.cp,
            sequence_parallel=layout.sequence_parallel,
            # Micro-batches differ in length; the dispatcher is named because its default refuses that, even unused.
            variable_seq_lengths=layout.pp > 1 and layout.vpp == 1,
            moe_token_dispatcher_type="alltoall",
            **experts,
            **_fp8_fields(hf, layout, fp8),
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


def _check_division(hf: HfConfig, layout: Layout) -> None:
    """ConfigError where the layout does not divide the model."""
    text, vision = hf.text_config, hf.vision_config
    if layout.ep > 1 and not isinstance(hf, Qwen3VLMoeConfig):
        raise ConfigError(f"parallel.ep = {layout.ep} divides experts, and a {hf.model_type!r} has none; set ep to 1")
    for name, size in (
        ("text_config.num_attention_heads", text.num_attention_heads),
        ("text_config.num_key_value_heads", text.num_key_value_heads),
        ("text_config.intermediate_size", text.intermediate_size),
        ("vision_config.num_heads", vision.num_heads),
        ("vision_config.intermediate_size", vision.intermediate_size),
    ):
        if size % layout.tp:
            raise ConfigError(f"parallel.tp = {layout.tp} does not divide {name} = {size}; choose a divisor")
    if text.num_hidden_layers % (layout.pp * layout.vpp):
        raise ConfigError(
            f"parallel.pp × vpp = {layout.pp} × {layout.vpp} does not divide text_config.num_hidden_layers = "
            f"{text.num_hidden_layers}"
        )


def _fp8_fields(hf: HfConfig, layout: Layout, fp8: Fp8Choice) -> dict[str, object]:
    text = hf.text_config
    return fp8_options(
        fp8.recipe,
        layers=text.num_hidden_layers,
        stages=layout.pp,
        bf16_layers_at_start=fp8.bf16_layers_at_start,
        bf16_layers_at_end=fp8.bf16_layers_at_end,
        sizes={
            "text_config.hidden_size": text.hidden_size,
            "text_config.intermediate_size": text.intermediate_size // layout.tp,
            "text_config.num_attention_heads × head_dim": text.num_attention_heads * text.head_dim // layout.tp,
        },
    )


def _transformer(layout: Layout, precision: Precision, recompute: Recompute, **model: object) -> TransformerConfig:
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
        recompute_granularity=None if recompute == "none" else recompute,
        recompute_modules=["core_attn"] if recompute == "selective" else None,
        recompute_method="uniform" if recompute == "full" else None,
        recompute_num_layers=1 if recompute == "full" else None,
    )


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch type of parameters and activations."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
