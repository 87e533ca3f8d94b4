"""A Hugging Face configuration of one of the families, as what megatron-core needs to know.

The families share their decoder. Qwen3-VL's has a vision tower before it, Qwen3's takes text alone; both exist dense
and with experts. Qwen2.5-VL's has biases in the place of norms of queries and keys, and a tower of another kind.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

from megatron.core.transformer.transformer_config import TransformerConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig
from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeConfig

from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.policy.fp8 import NO_FP8, Fp8Choice, fp8_options
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl.moe import moe_fields
from copd_megatron.policy.qwen3_vl.transformer import (
    ACTIVATIONS,
    Precision,
    Recompute,
    gated,
    torch_dtype,
    transformer,
)
from copd_megatron.policy.qwen3_vl.vision_settings import TowerSettings, tower_settings

__all__ = [
    "HfConfig",
    "Precision",
    "Qwen3VLSettings",
    "Recompute",
    "TextSettings",
    "load_config",
    "settings",
    "torch_dtype",
]

HfConfig: TypeAlias = Qwen3VLConfig | Qwen3VLMoeConfig | Qwen3Config | Qwen3MoeConfig | Qwen2_5_VLConfig

FAMILIES: dict[str, type[HfConfig]] = {
    kind.model_type: kind for kind in (Qwen3VLConfig, Qwen3VLMoeConfig, Qwen3Config, Qwen3MoeConfig, Qwen2_5_VLConfig)
}
"""Configurations by the `model_type` in config.json."""

WITH_EXPERTS = (Qwen3VLMoeConfig, Qwen3MoeConfig)
WITH_VISION = (Qwen3VLConfig, Qwen3VLMoeConfig, Qwen2_5_VLConfig)


@dataclass(frozen=True)
class TextSettings:
    """What the language model needs beside its `TransformerConfig`.

    `mrope_section` is how many rotary frequencies listen to time, row and column: in turn if `mrope_interleaved`,
    otherwise one axis after the other.
    """

    vocab_size: int
    padded_vocab_size: int
    tied: bool
    rope_theta: float
    mrope_section: tuple[int, int, int]
    mrope_interleaved: bool


@dataclass(frozen=True)
class Qwen3VLSettings:
    """One model on one layout: settings and the `TransformerConfig`s of both transformers.

    `family` is the name of the weight table, and of the model's kind in its config.json. A model that takes text alone
    has no `vision` and no `vision_config`.
    """

    family: str
    hf: HfConfig
    text: TextSettings
    vision: TowerSettings | None
    text_config: TransformerConfig
    vision_config: TransformerConfig | None


def load_config(source: str | os.PathLike[str] | HfConfig) -> HfConfig:
    """The configuration in a Hugging Face folder (or the one given). WeightsError if it is of no known family."""
    if isinstance(source, tuple(FAMILIES.values())):
        return source
    content, _ = Qwen3VLConfig.get_config_dict(source, local_files_only=True)
    kind = FAMILIES.get(str(content.get("model_type")))
    if kind is None:
        raise WeightsError(
            f"{source}: config.json says model_type {content.get('model_type')!r}; the policy can be "
            f"{', '.join(map(repr, FAMILIES))}"
        )
    config: HfConfig = kind.from_dict(content)
    return config


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
    text, part = text_part(hf)
    _check_text(text, part)
    _check_division(hf, text, part, layout)
    experts = {}
    if isinstance(hf, WITH_EXPERTS):
        experts = moe_fields(text, part, layout, stacked=isinstance(hf, Qwen3VLMoeConfig))
    elif layout.ep > 1:
        raise ConfigError(f"parallel.ep = {layout.ep} divides experts, and a {hf.model_type!r} has none; set ep to 1")
    vision, vision_config = None, None
    if isinstance(hf, WITH_VISION):
        vision, vision_config = tower_settings(hf, layout, precision, recompute)
    head, biased = head_dim(text), isinstance(hf, Qwen2_5_VLConfig)
    return Qwen3VLSettings(
        family=hf.model_type,
        hf=hf,
        text=TextSettings(
            vocab_size=text.vocab_size,
            padded_vocab_size=-(-text.vocab_size // layout.tp) * layout.tp,
            tied=hf.tie_word_embeddings,
            rope_theta=text.rope_parameters["rope_theta"],
            mrope_section=_mrope_section(hf, text, head // 2),
            mrope_interleaved=not biased,
        ),
        vision=vision,
        text_config=transformer(
            layout,
            precision,
            recompute,
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            ffn_hidden_size=text.intermediate_size,
            num_attention_heads=text.num_attention_heads,
            num_query_groups=text.num_key_value_heads,
            kv_channels=head,
            normalization="RMSNorm",
            layernorm_epsilon=text.rms_norm_eps,
            **gated(text.hidden_act),
            add_bias_linear=False,
            add_qkv_bias=biased,
            qk_layernorm=not biased,
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
            **fp8_options(
                fp8.recipe,
                layers=text.num_hidden_layers,
                stages=layout.pp,
                bf16_layers_at_start=fp8.bf16_layers_at_start,
                bf16_layers_at_end=fp8.bf16_layers_at_end,
                sizes={
                    f"{part}hidden_size": text.hidden_size,
                    f"{part}intermediate_size": text.intermediate_size // layout.tp,
                    f"{part}num_attention_heads × head_dim": text.num_attention_heads * head // layout.tp,
                },
            ),
        ),
        vision_config=vision_config,
    )


def text_part(hf: HfConfig) -> tuple[Any, str]:
    """The part of a configuration that describes the language model, and what its fields' names start with."""
    return (hf.text_config, "text_config.") if isinstance(hf, WITH_VISION) else (hf, "")


def head_dim(text: Any) -> int:
    """Features of an attention head."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _mrope_section(hf: HfConfig, text: Any, half: int) -> tuple[int, int, int]:
    """How many of `half` rotary frequencies listen to each axis. Without images, time is the only one."""
    if not isinstance(hf, WITH_VISION):
        return half, 0, 0
    chunked = isinstance(hf, Qwen2_5_VLConfig)
    section = text.rope_parameters.get("mrope_section", (16, 24, 24) if chunked else (24, 20, 20))
    if len(section) != 3 or (chunked and sum(section) != half):
        raise ConfigError(
            f"text_config.rope_parameters: mrope_section is {list(section)}; expected three numbers that add up to "
            f"{half}, half of an attention head"
        )
    time, row, column = section
    return time, row, column


def _check_text(text: Any, part: str) -> None:
    """ConfigError for what the decoder does not do."""
    kind = text.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise ConfigError(f"{part}rope_parameters: rope_type {kind!r} is not supported, only 'default'")
    if getattr(text, "attention_bias", False):
        raise ConfigError(
            f"{part}attention_bias is true; released models of these families have it off: set it to false"
        )
    if getattr(text, "use_sliding_window", False):
        raise ConfigError(f"{part}use_sliding_window is true; every layer attends to all tokens: set it to false")
    if others := set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        raise ConfigError(f"{part}layer_types names {', '.join(sorted(others))}; only full_attention is supported")
    _check_activation(part, text.hidden_act)


def _check_activation(part: str, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"{part}hidden_act is {activation!r}; known are {', '.join(ACTIVATIONS)}")


def _check_division(hf: Any, text: Any, part: str, layout: Layout) -> None:
    """ConfigError where the layout does not divide the model."""
    sizes = {
        f"{part}num_attention_heads": text.num_attention_heads,
        f"{part}num_key_value_heads": text.num_key_value_heads,
        f"{part}intermediate_size": text.intermediate_size,
    }
    if isinstance(hf, WITH_VISION):
        sizes["vision_config.num_heads"] = hf.vision_config.num_heads
        sizes["vision_config.intermediate_size"] = hf.vision_config.intermediate_size
    for name, size in sizes.items():
        if size % layout.tp:
            raise ConfigError(f"parallel.tp = {layout.tp} does not divide {name} = {size}; choose a divisor")
    if text.num_hidden_layers % (layout.pp * layout.vpp):
        raise ConfigError(
            f"parallel.pp × vpp = {layout.pp} × {layout.vpp} does not divide {part}num_hidden_layers = "
            f"{text.num_hidden_layers}"
        )
