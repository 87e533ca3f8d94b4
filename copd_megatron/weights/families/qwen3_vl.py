"""Dense Qwen3-VL: `Qwen3VLForConditionalGeneration` and `copd_megatron.policy.qwen3_vl.Qwen3VLModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from copd_megatron.weights.families.row import (
    Flattened,
    FusedQueryKeyValue,
    Padded,
    QueryKeyValue,
    Row,
    Section,
    Stacked,
)

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

EMBEDDING = "model.language_model.embed_tokens.weight"
LAYER, HF_LAYER = "decoder.layers.*.", "model.language_model.layers.*."


def table(settings: Qwen3VLSettings) -> tuple[Section, ...]:
    """Every parameter of the model, in the order in which they are exported."""
    config = settings.text_config
    layer = attention(config.num_attention_heads, config.num_query_groups) + mlp()
    return around_layers(settings, (Section(config.num_layers, layer),))


def around_layers(settings: Qwen3VLSettings, layers: tuple[Section, ...]) -> tuple[Section, ...]:
    """The table of a model whose decoder layers are `layers`."""
    text, vision = settings.text, settings.vision
    vocabulary = Padded(text.vocab_size, text.padded_vocab_size)
    output = EMBEDDING if text.tied else "lm_head.weight"
    return (
        Section(1, (Row("embedding.word_embeddings.weight", (EMBEDDING,), vocabulary, shard=0),)),
        Section(1, _patches(vision.patch_shape)),
        Section(settings.vision_config.num_layers, _vision_layer(settings.vision_config.num_attention_heads)),
        Section(1, _merger("vision.merger", "model.visual.merger")),
        Section(
            len(vision.deepstack_layers),
            _merger("vision.deepstack_mergers.*", "model.visual.deepstack_merger_list.*"),
        ),
        *layers,
        Section(
            1,
            (
                Row("decoder.final_layernorm.weight", ("model.language_model.norm.weight",)),
                Row("output_layer.weight", (output,), vocabulary, shard=0, exported=not text.tied),
            ),
        ),
    )


def _patches(patch_shape: tuple[int, ...]) -> tuple[Row, ...]:
    return (
        Row("vision.patch_embedding.weight", ("model.visual.patch_embed.proj.weight",), Flattened(patch_shape)),
        Row("vision.patch_embedding.bias", ("model.visual.patch_embed.proj.bias",)),
        Row("vision.position_embedding.weight", ("model.visual.pos_embed.weight",)),
    )


def _vision_layer(heads: int) -> tuple[Row, ...]:
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


def attention(heads: int, groups: int) -> tuple[Row, ...]:
    """A decoder layer's attention and the norm before it."""
    m, h = LAYER, HF_LAYER
    own = h + "self_attn."
    return (
        Row(
            (m + "input_layernorm.weight", m + "self_attention.linear_qkv.layer_norm_weight"),
            (h + "input_layernorm.weight",),
        ),
        Row(
            m + "self_attention.linear_qkv.weight",
            (own + "q_proj.weight", own + "k_proj.weight", own + "v_proj.weight"),
            QueryKeyValue(heads, groups),
            shard=0,
        ),
        Row(m + "self_attention.q_layernorm.weight", (own + "q_norm.weight",)),
        Row(m + "self_attention.k_layernorm.weight", (own + "k_norm.weight",)),
        Row(m + "self_attention.linear_proj.weight", (own + "o_proj.weight",), shard=1),
    )


def mlp() -> tuple[Row, ...]:
    """A decoder layer's MLP and the norm before it."""
    m, h = LAYER, HF_LAYER
    return (
        Row(
            (m + "pre_mlp_layernorm.weight", m + "mlp.linear_fc1.layer_norm_weight"),
            (h + "post_attention_layernorm.weight",),
        ),
        Row(
            m + "mlp.linear_fc1.weight",
            (h + "mlp.gate_proj.weight", h + "mlp.up_proj.weight"),
            Stacked(),
            shard=0,
            blocks=2,
        ),
        Row(m + "mlp.linear_fc2.weight", (h + "mlp.down_proj.weight",), shard=1),
    )
