"""The policy: dense Qwen3-VL on megatron-core's building blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from copd_megatron.policy import platform

platform.prepare()

from copd_megatron.policy.layout import Layout  # noqa: E402
from copd_megatron.policy.qwen3_vl.config import Precision, load_config, settings, torch_dtype  # noqa: E402
from copd_megatron.policy.qwen3_vl.model import Qwen3VLModel  # noqa: E402

if TYPE_CHECKING:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

__all__ = ["Qwen3VLModel", "build_model"]


def build_model(
    source: str | os.PathLike[str] | Qwen3VLConfig, layout: Layout, precision: Precision, recompute: bool = False
) -> list[Qwen3VLModel]:
    """This process's part of the model, randomly initialised, on its device: a list of one model chunk.

    `source` is a Hugging Face folder, of which only config.json is read, or a configuration. `layout.initialize` must
    have been called. `recompute` trades time for memory: layers are computed again in the backward pass. Weights come
    from `copd_megatron.weights.mapping.to_megatron`. ConfigError if the layout does not fit the model.
    """
    from megatron.core import parallel_state

    model = Qwen3VLModel(
        settings(load_config(source), layout, precision, recompute),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    return [model.to(device=platform.device(), dtype=torch_dtype(precision))]
