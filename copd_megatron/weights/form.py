"""What a Hugging Face folder's config.json says about a model's weights: their table, and the shapes they have."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.policy.qwen3_vl.config import load_config, settings
from copd_megatron.weights.collect import Entry
from copd_megatron.weights.families import qwen2_5_vl
from copd_megatron.weights.families.qwen3_vl_moe import as_published
from copd_megatron.weights.hf import read_config
from copd_megatron.weights.mapping import entries_of


class ModelForm:
    """The model that config.json of the Hugging Face folder `path` describes, without any weights."""

    def __init__(self, path: Path, layout: Layout | None = None) -> None:
        """Raises WeightsError for a model that the policy does not know, ConfigError for one that `layout` does not
        divide."""
        self.path = path
        self.config = read_config(path)
        hf = load_config(path)
        # The table is the same in every number format.
        self._settings = settings(hf, layout or Layout(), "fp32")
        config = self._settings.text_config
        if config.num_attention_heads % config.num_query_groups:
            raise WeightsError(
                f"{path / 'config.json'}: {config.num_attention_heads} attention heads cannot share "
                f"{config.num_query_groups} keys and values; expected a multiple"
            )
        # A layout pads the vocabulary; the table that is read and written by is that of no division at all.
        self.table: list[Entry] = entries_of(settings(hf, Layout(), "fp32"))
        self.shapes = _shapes(hf, self.config)
        """Of transformers' tensors by their names. Files may hold experts under other names."""

    def misfit(self, entry: Entry, parts: Mapping[str, tuple[int, ...]]) -> str | None:
        """Why tensors of these shapes are not those of `entry` in this model; None if they are.

        `parts` are the shapes of the entry's Hugging Face tensors by their names.
        """
        for name, shape in parts.items():
            expected = self.shapes.get(name)
            if expected is not None and shape != expected:
                return f"{name} is {list(shape)}, {self.path / 'config.json'} says {list(expected)}"
        row = entry.row
        if row.experts and (inner := self._settings.text_config.moe_ffn_hidden_size):
            # Under whatever names files hold experts, Megatron's matrices are all alike.
            hidden = self._settings.text_config.hidden_size
            matrix = [row.blocks * inner, hidden] if row.shard == 0 else [hidden, inner]
            full = joined_shape(entry, list(parts.values()))
            if full != (row.experts, *matrix):
                found = "do not fit each other" if full is None else f"make {list(full)}"
                return (
                    f"{entry.hf[0]}{', …' if len(entry.hf) > 1 else ''}: the experts {found}, "
                    f"{self.path / 'config.json'} says {[row.experts, *matrix]}"
                )
        return None


def joined_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shape of the full Megatron tensor that Hugging Face tensors of these shapes make; None if they do not."""
    with contextlib.suppress(RuntimeError):
        return tuple(entry.row.joint.join([torch.empty(shape, device="meta") for shape in shapes]).shape)
    return None


def _shapes(hf: Any, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of transformers' model by their published names; nothing is allocated."""
    declare_torchvision_schemas()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        tensors = kind.from_config(hf).state_dict()
    rename = qwen2_5_vl.published_name if config.get("model_type") == "qwen2_5_vl" else str
    return {rename(name): tuple(as_published(name, tensor, config).shape) for name, tensor in tensors.items()}
