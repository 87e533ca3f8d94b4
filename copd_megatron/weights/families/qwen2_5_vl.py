"""Qwen2.5-VL: `Qwen2_5_VLForConditionalGeneration` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel` with a
`WindowedTower`.

Names are those of published files, which transformers 5 saves too; in memory it has `model.language_model.` and
`model.visual.` in the place of `model.` and `visual.`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copd_megatron.weights.families.decoder import around_layers, dense_layers
from copd_megatron.weights.families.row import Flattened, FusedQueryKeyValue, Row, Section, Stacked

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

LANGUAGE, VISION = "model.", "visual."


def published_name(name: str) -> str:
    """What the parameter that transformers calls `name` in memory is called in files."""
    return name.replace("model.visual.", VISION).replace("model.language_model.", LANGUAGE)


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    return around_layers(settings, LANGUAGE, dense_layers(settings, LANGUAGE), _tower(settings))


def _tower(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    vision, config = settings.vision, settings.vision_config
    assert vision is not None
    assert config is not None
    patches = Row("vision.patch_embedding.weight", (VISION + "patch_embed.proj.weight",), Flattened(vision.patch_shape))
    return (
        Section(1, (patches,)),
        Section(config.num_layers, _layer(config.num_attention_heads)),
        Section(1, _merger()),
    )


def _layer(heads: int) -> tuple[Row, ...]:
    m, h = "vision.blocks.layers.*.", VISION + "blocks.*."
    qkv = FusedQueryKeyValue(heads)
    return (
        Row((m + "input_layernorm.weight", m + "self_attention.linear_qkv.layer_norm_weight"), (h + "norm1.weight",)),
        Row(m + "self_attention.linear_qkv.weight", (h + "attn.qkv.weight",), qkv, shard=0),
        Row(m + "self_attention.linear_qkv.bias", (h + "attn.qkv.bias",), qkv, shard=0),
        Row(m + "self_attention.linear_proj.weight", (h + "attn.proj.weight",), shard=1),
        Row(m + "self_attention.linear_proj.bias", (h + "attn.proj.bias",)),
        Row((m + "pre_mlp_layernorm.weight", m + "mlp.linear_fc1.layer_norm_weight"), (h + "norm2.weight",)),
        *(
            Row(
                m + "mlp.linear_fc1." + kind,
                (h + "mlp.gate_proj." + kind, h + "mlp.up_proj." + kind),
                Stacked(),
                shard=0,
                blocks=2,
            )
            for kind in ("weight", "bias")
        ),
        Row(m + "mlp.linear_fc2.weight", (h + "mlp.down_proj.weight",), shard=1),
        Row(m + "mlp.linear_fc2.bias", (h + "mlp.down_proj.bias",)),
    )


def _merger() -> tuple[Row, ...]:
    m, h = "vision.merger.", VISION + "merger."
    return (
        Row(m + "norm.weight", (h + "ln_q.weight",)),
        Row(m + "mlp.linear_fc1.weight", (h + "mlp.0.weight",), shard=0),
        Row(m + "mlp.linear_fc1.bias", (h + "mlp.0.bias",), shard=0),
        Row(m + "mlp.linear_fc2.weight", (h + "mlp.2.weight",), shard=1),
        Row(m + "mlp.linear_fc2.bias", (h + "mlp.2.bias",)),
    )
