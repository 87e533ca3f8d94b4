"""The language model that all families share, and what stands before and behind its layers.

`hf` is what the Hugging Face names of the language model start with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from copd_megatron.weights.families.row import Padded, QueryKeyValue, Row, Section, Stacked

if TYPE_CHECKING:
    from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings

LAYER = "decoder.layers.*."


def around_layers(
    settings: Qwen3VLSettings, hf: str, layers: tuple[Section, ...], vision: tuple[Section, ...] = ()
) -> tuple[Section, ...]:
    """The table of a model whose decoder layers are `layers` and whose vision tower is `vision`, in the order in which
    the parameters are exported."""
    text, embedding = settings.text, hf + "embed_tokens.weight"
    vocabulary = Padded(text.vocab_size, text.padded_vocab_size)
    output = embedding if text.tied else "lm_head.weight"
    return (
        Section(1, (Row("embedding.word_embeddings.weight", (embedding,), vocabulary, shard=0),)),
        *vision,
        *layers,
        Section(
            1,
            (
                Row("decoder.final_layernorm.weight", (hf + "norm.weight",)),
                Row("output_layer.weight", (output,), vocabulary, shard=0, exported=not text.tied),
            ),
        ),
    )


def dense_layers(settings: Qwen3VLSettings, hf: str) -> tuple[Section, ...]:
    """Decoder layers that are all alike."""
    return (Section(settings.text_config.num_layers, attention(settings, hf) + mlp(hf)),)


def mixed_layers(settings: Qwen3VLSettings, hf: str, experts: tuple[Row, ...]) -> tuple[Section, ...]:
    """Decoder layers of which some have the rows `experts` in the place of an MLP's."""
    from copd_megatron.policy.qwen3_vl.moe import has_experts

    config, own = settings.text_config, attention(settings, hf)
    return tuple(
        Section(1, own + (experts if has_experts(config, number) else mlp(hf)), number)
        for number in range(config.num_layers)
    )


def attention(settings: Qwen3VLSettings, hf: str) -> tuple[Row, ...]:
    """A decoder layer's attention, with norms of queries and keys or with biases, and the norm before it."""
    config, m, h = settings.text_config, LAYER, hf + "layers.*."
    own = h + "self_attn."
    qkv = QueryKeyValue(config.num_attention_heads, config.num_query_groups)
    norms = tuple(
        Row(f"{m}self_attention.{kind}_layernorm.weight", (f"{own}{kind}_norm.weight",)) for kind in ("q", "k")
    )
    return (
        Row(
            (m + "input_layernorm.weight", m + "self_attention.linear_qkv.layer_norm_weight"),
            (h + "input_layernorm.weight",),
        ),
        *(
            Row(
                m + "self_attention.linear_qkv." + kind,
                tuple(f"{own}{projection}_proj.{kind}" for projection in ("q", "k", "v")),
                qkv,
                shard=0,
            )
            for kind in (("weight", "bias") if config.add_qkv_bias else ("weight",))
        ),
        *(norms if config.qk_layernorm else ()),
        Row(m + "self_attention.linear_proj.weight", (own + "o_proj.weight",), shard=1),
    )


def mlp(hf: str) -> tuple[Row, ...]:
    """A decoder layer's MLP and the norm before it."""
    m, h = LAYER, hf + "layers.*."
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


def router(hf: str) -> tuple[Row, ...]:
    """What chooses among a decoder layer's experts, and the norm before it."""
    m, h = LAYER, hf + "layers.*."
    return (
        Row(m + "pre_mlp_layernorm.weight", (h + "post_attention_layernorm.weight",)),
        Row(m + "mlp.router.weight", (h + "mlp.gate.weight",)),
    )


def expert_names(matrix: str) -> tuple[str, str]:
    """The names of each expert's `matrix` in megatron-core's own layers and in Transformer Engine's grouped ones."""
    return LAYER + f"mlp.experts.local_experts.#.{matrix}.weight", LAYER + f"mlp.experts.{matrix}.weight#"
