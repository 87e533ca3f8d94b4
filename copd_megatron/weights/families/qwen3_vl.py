"""Dense Qwen3-VL: `Qwen3VLForConditionalGeneration` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from copd_megatron.weights.families.decoder import around_layers, dense_layers
from copd_megatron.weights.families.row import Flattened, FusedQueryKeyValue, Row, Section

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

LANGUAGE = "model.language_model."


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    return around_layers(settings, LANGUAGE, dense_layers(settings, LANGUAGE), tower(settings))


def tower(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """The parameters of the vision tower."""
    vision, config = settings.vision, settings.vision_config
    assert vision is not None
    assert config is not None
    return (
        Section(1, _patches(vision.patch_shape)),
        Section(config.num_layers, _layer(config.num_attention_heads)),
        Section(1, _merger("vision.merger", "model.visual.merger")),
        Section(
            len(vision.deepstack_layers),
            _merger("vision.deepstack_mergers.*", "model.visual.deepstack_merger_list.*"),
        ),
    )


def _patches(patch_shape: tuple[int, ...]) -> tuple[Row, ...]:
    return (
        Row("vision.patch_embedding.weight", ("model.visual.patch_embed.proj.weight",), Flattened(patch_shape)),
        Row("vision.patch_embedding.bias", ("model.visual.patch_embed.proj.bias",)),
        Row("vision.position_embedding.weight", ("model.visual.pos_embed.weight",)),
    )


def _layer(heads: int) -> tuple[Row, ...]:
    m, h = "vision.blocks.layers.*.", "model.visual.blocks.*."
    qkv = FusedQueryKeyValue(heads)
    return (
        Row((m + "input_layernorm.weight", m + "self_attention.linear_qkv.layer_norm_weight"), (h + "norm1.weight",)),
        Row((m + "input_layernorm.bias", m + "self_attention.linear_qkv.layer_norm_bias"), (h + "norm1.bias",)),
        Row(m + "self_attention.linear_qkv.weight", (h + "attn.qkv.weight",), qkv, shard=0),
        Row(m + "self_attention.linear_qkv.bias", (h + "attn.qkv.bias",), qkv, shard=0),
        Row(m + "self_attention.linear_proj.weight", (h + "attn.proj.weight",), shard=1),
        Row(m + "self_attention.linear_proj.bias", (h + "attn.proj.bias",)),
        Row((m + "pre_mlp_layernorm.weight", m + "mlp.linear_fc1.layer_norm_weight"), (h + "norm2.weight",)),
        Row((m + "pre_mlp_layernorm.bias", m + "mlp.linear_fc1.layer_norm_bias"), (h + "norm2.bias",)),
        Row(m + "mlp.linear_fc1.weight", (h + "mlp.linear_fc1.weight",), shard=0),
        Row(m + "mlp.linear_fc1.bias", (h + "mlp.linear_fc1.bias",), shard=0),
        Row(m + "mlp.linear_fc2.weight", (h + "mlp.linear_fc2.weight",), shard=1),
        Row(m + "mlp.linear_fc2.bias", (h + "mlp.linear_fc2.bias",)),
    )


def _merger(m: str, h: str) -> tuple[Row, ...]:
    return (
        Row(m + ".norm.weight", (h + ".norm.weight",)),
        Row(m + ".norm.bias", (h + ".norm.bias",)),
        Row(m + ".mlp.linear_fc1.weight", (h + ".linear_fc1.weight",), shard=0),
        Row(m + ".mlp.linear_fc1.bias", (h + ".linear_fc1.bias",), shard=0),
        Row(m + ".mlp.linear_fc2.weight", (h + ".linear_fc2.weight",), shard=1),
        Row(m + ".mlp.linear_fc2.bias", (h + ".linear_fc2.bias",)),
    )
