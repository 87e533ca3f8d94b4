"""Experts in the place of some layers' MLPs: what megatron-core needs to know, and which layers have them."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from copd_megatron.errors import ConfigError
from copd_megatron.policy import platform
from copd_megatron.policy.layout import Layout


def moe_fields(text: Any, part: str, layout: Layout, stacked: bool) -> dict[str, Any]:
    """The fields of `TransformerConfig` that say which layers have experts, how tokens find them and who holds them.

    `part` is what the names of `text`'s fields start with in messages. `stacked` tells that the published files hold
    the matrices of a layer's experts as one tensor.

    The router works in float32 and has no balancing loss: reinforcement learning starts from a balanced model, and the
    loss of another objective would mix into its gradient. ConfigError if the model or the layout is not supported.
    """
    sparse = _sparse_layers(text, part)
    _check_router(text, part)
    _check_layout(text, part, layout)
    if stacked:
        _check_turned(text, part)
    return {
        "num_moe_experts": text.num_experts,
        "moe_ffn_hidden_size": text.moe_intermediate_size,
        # One number where all layers are alike: their weights then lie in a checkpoint as one tensor per kind.
        "moe_layer_freq": 1 if all(sparse) else [int(layer) for layer in sparse],
        "moe_router_topk": text.num_experts_per_tok,
        # The softmax over the chosen experts alone is the softmax over all of them, normalised after the choice.
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_grouped_gemm": platform.has_transformer_engine(),
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.expert_tp,
    }


def has_experts(config: TransformerConfig, layer: int) -> bool:
    """Whether decoder layer `layer`, counted from 0 over all stages, has experts."""
    if config.num_moe_experts is None:
        return False
    return not isinstance(config.moe_layer_freq, list) or bool(config.moe_layer_freq[layer])


def expert_submodules(layer: ModuleSpec) -> Any:
    """The submodules that each expert is made of (`MLPSubmodules`), in the spec of a layer with experts."""
    moe: MoESubmodules = layer.submodules.mlp.submodules
    # megatron-core's own layers would save this norm under the name it has when fused into a dense MLP, which
    # Transformer Engine's layers do only where there is one: a checkpoint of one could not be read by the other.
    (layer.submodules.sharded_state_dict_keys_map or {}).pop("pre_mlp_layernorm.", None)
    return moe.experts.submodules  # type: ignore[union-attr]


def _sparse_layers(text: Any, part: str) -> list[bool]:
    step, layers, dense = text.decoder_sparse_step, text.num_hidden_layers, text.mlp_only_layers or []
    if step < 1:
        raise ConfigError(f"{part}decoder_sparse_step is {step}; expected 1 (every layer has experts) or more")
    if outside := [layer for layer in dense if not 0 <= layer < layers]:
        raise ConfigError(f"{part}mlp_only_layers names layers {outside}; the model has layers 0 to {layers - 1}")
    sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
    if text.num_experts < 1 or not any(sparse):
        sibling = text.model_type.removesuffix("_text").removesuffix("_moe")
        raise ConfigError(
            f"with {part}num_experts {text.num_experts}, decoder_sparse_step {step} and mlp_only_layers {dense} "
            f"no layer has experts; a dense model has the model_type {sibling!r}"
        )
    return sparse


def _check_router(text: Any, part: str) -> None:
    chosen, experts = text.num_experts_per_tok, text.num_experts
    if not 2 <= chosen <= experts:
        raise ConfigError(f"{part}num_experts_per_tok is {chosen}; expected 2 to {experts} of {experts} experts")
    if not getattr(text, "norm_topk_prob", True):
        raise ConfigError(
            f"{part}norm_topk_prob is false; only models that normalise the weights of the chosen experts are supported"
        )


def _check_layout(text: Any, part: str, layout: Layout) -> None:
    inner = text.moe_intermediate_size
    if text.num_experts % layout.ep:
        raise ConfigError(
            f"parallel.ep = {layout.ep} does not divide {part}num_experts = {text.num_experts}; choose a divisor"
        )
    if inner % layout.expert_tp:
        raise ConfigError(
            f"parallel.etp = {layout.expert_tp} does not divide {part}moe_intermediate_size = {inner}; choose a divisor"
        )
    if layout.tp > 1 and not layout.sequence_parallel:
        raise ConfigError(
            f"parallel.tp = {layout.tp} without sequence parallelism would send every token to its experts "
            f"{layout.tp} times; set parallel.sequence_parallel"
        )
    if layout.ep == 1 and layout.expert_tp != layout.tp:
        raise ConfigError(
            f"parallel.etp = {layout.etp} differs from tp = {layout.tp} while ep is 1: megatron-core would not add up "
            "the experts' gradients; leave etp out or choose an ep of at least 2"
        )


def _check_turned(text: Any, part: str) -> None:
    inner, hidden = text.moe_intermediate_size, text.hidden_size
    if hidden in (inner, 2 * inner):
        raise ConfigError(
            f"{part}hidden_size = {hidden} makes an expert's matrices square (moe_intermediate_size = {inner}), "
            "and Hugging Face's files do not say which way round a square one is"
        )
