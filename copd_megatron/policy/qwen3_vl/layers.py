"""Layer specs of both transformers: megatron-core's own modules around our packed attention."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    LayerNormImpl,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor

from copd_megatron.policy import platform
from copd_megatron.policy.attention import PackedAttention, PackedTokens
from copd_megatron.policy.elementwise import RMSNorm, swiglu
from copd_megatron.policy.linear import use_own_linears
from copd_megatron.policy.qwen3_vl.moe import expert_submodules, has_experts


class DeepStackLayer(TransformerLayer):
    """A decoder layer that adds image features of the same depth to its output, as the first layers of
    `Qwen3VLTextModel` do.

    megatron-core threads `context` through every layer, and through recomputation; here it carries the features
    [taps, merged patches, H] of this and the following layers of the stage.
    """

    def forward(
        self, hidden_states: Tensor, *, context: Tensor | None = None, packed_seq_params: PackedTokens, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden_states` [T, 1, H] to the same, and `context` as it came."""
        hidden_states, _ = super().forward(
            hidden_states=hidden_states, packed_seq_params=packed_seq_params, **{**kwargs, "context": None}
        )
        where = packed_seq_params.features
        if context is not None and where is not None and self.layer_number - 1 < where.first + len(context):
            features = context[self.layer_number - 1 - where.first]
            if where.rows is not None:
                features = features.index_select(0, where.rows)
            hidden_states = hidden_states.index_add(0, where.index, features.unsqueeze(1))
        return hidden_states, context


def layer_spec(
    config: TransformerConfig, layer: type[TransformerLayer] = TransformerLayer, experts: bool = False
) -> ModuleSpec:
    """The spec of one layer: Transformer Engine's modules on GPU, megatron-core's own and ours elsewhere."""
    count = config.num_moe_experts if experts else None
    if platform.has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=count, moe_grouped_gemm=config.moe_grouped_gemm, qk_layernorm=config.qk_layernorm
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=count, qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    attention = spec.submodules.self_attention.submodules
    mlp = expert_submodules(spec) if experts else spec.submodules.mlp.submodules
    spec.module = layer
    attention.core_attention = PackedAttention
    if _own_norm(config):
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.use_te_activation_func:
        mlp.activation_func = swiglu
    if not platform.on_gpu():
        use_own_linears(spec)
    return spec


def decoder_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The specs of this stage's decoder layers, of which some may have experts, and the norm behind the last."""
    first = get_transformer_layer_offset(config, vp_stage)
    stage = range(first, first + get_num_layers_to_build(config, vp_stage))
    norm = RMSNorm if _own_norm(config) else LayerNormImpl
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config, DeepStackLayer, has_experts(config, layer)) for layer in stage],
        layer_norm=norm,
    )


def _own_norm(config: TransformerConfig) -> bool:
    return config.normalization == "RMSNorm" and not platform.has_transformer_engine()
