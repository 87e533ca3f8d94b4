"""What the vision towers are built from: Qwen3-VL's and Qwen2.5-VL's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from copd_megatron.errors import ConfigError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl.transformer import ACTIVATIONS, Precision, Recompute, gated, transformer


@dataclass(frozen=True, kw_only=True)
class TowerSettings:
    """What every tower needs beside its `TransformerConfig`. Sizes count pixels, patches, frames or features."""

    patch_features: int
    patch_shape: tuple[int, int, int, int]
    merge: int
    rope_theta: float
    out_hidden_size: int
    deepstack_layers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VisionSettings(TowerSettings):
    """Qwen3-VL's tower: `position_grid` is the side of its square of learned positions."""

    position_grid: int


@dataclass(frozen=True, kw_only=True)
class WindowSettings(TowerSettings):
    """Qwen2.5-VL's tower: attention stays in windows of `window` × `window` merged patches, but for `full_layers`."""

    window: int
    full_layers: tuple[int, ...]


def tower_settings(
    hf: Any, layout: Layout, precision: Precision, recompute: Recompute
) -> tuple[TowerSettings, TransformerConfig]:
    """Both parts of a tower's settings, from a configuration with a `vision_config`.

    ConfigError if the model is not supported.
    """
    vision = hf.vision_config
    if vision.hidden_act not in ACTIVATIONS:
        raise ConfigError(f"vision_config.hidden_act is {vision.hidden_act!r}; known are {', '.join(ACTIVATIONS)}")
    common = {
        "patch_features": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        "patch_shape": (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size),
        "merge": vision.spatial_merge_size,
        "rope_theta": vision.rope_parameters["rope_theta"],
        "out_hidden_size": vision.out_hidden_size,
    }
    own: TowerSettings
    layers: dict[str, object]
    if hasattr(vision, "window_size"):
        own = WindowSettings(**common, window=_window(vision), full_layers=_full_layers(vision))
        layers = {"normalization": "RMSNorm", **gated(vision.hidden_act)}
    else:
        own = VisionSettings(
            **common,
            position_grid=round(vision.num_position_embeddings**0.5),
            deepstack_layers=tuple(vision.deepstack_visual_indexes),
        )
        layers = {"normalization": "LayerNorm", "activation_func": ACTIVATIONS[vision.hidden_act]}
    return own, transformer(
        layout,
        precision,
        recompute,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_heads,
        layernorm_epsilon=1e-6,
        add_bias_linear=True,
        init_method_std=vision.initializer_range,
        **layers,
    )


def _full_layers(vision: Any) -> tuple[int, ...]:
    return tuple(layer for layer in range(vision.depth) if layer in vision.fullatt_block_indexes)


def _window(vision: Any) -> int:
    """Merged patches on a window's side."""
    pixels = vision.spatial_merge_size * vision.patch_size
    window = int(vision.window_size) // pixels
    if window < 1:
        raise ConfigError(
            f"vision_config.window_size is {vision.window_size}; a window holds at least one merged patch, which is "
            f"{pixels} pixels wide"
        )
    return window
