"""Layer specs of both transformers: megatron-core's own modules around our packed attention."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from copd_megatron.policy import platform
from copd_megatron.policy.attention import PackedAttention, PackedTokens
from copd_megatron.policy.elementwise import RMSNorm, swiglu


class DeepStackLayer(TransformerLayer):
    """A decoder layer that adds image features of the same depth to its output, as the first layers of
    `Qwen3VLTextModel` do.

    megatron-core threads `context` through every layer, and through recomputation; here it carries the features
    [taps, merged patches, H], of which layer n (counted from 1) adds the n-th.
    """

    def forward(
        self, hidden_states: Tensor, *, context: Tensor | None = None, packed_seq_params: PackedTokens, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`hidden_states` [T, 1, H] to the same, and `context` as it came."""
        hidden_states, _ = super().forward(
            hidden_states=hidden_states, packed_seq_params=packed_seq_params, **{**kwargs, "context": None}
        )
        index = packed_seq_params.visual_index
        if context is not None and index is not None and self.layer_number <= len(context):
            hidden_states = hidden_states.index_add(0, index, context[self.layer_number - 1].unsqueeze(1))
        return hidden_states, context


def layer_spec(config: TransformerConfig, layer: type[TransformerLayer] = TransformerLayer) -> ModuleSpec:
    """The spec of one layer: Transformer Engine's modules on GPU, megatron-core's own and ours elsewhere."""
    if platform.has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    spec.module = layer
    attention.core_attention = PackedAttention
    if config.normalization == "RMSNorm" and not platform.has_transformer_engine():
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.use_te_activation_func:
        mlp.activation_func = swiglu
    return spec
