"""The policy on megatron-core's building blocks: Qwen3-VL, and Qwen3 as its decoder alone."""

from __future__ import annotations

import os

from copd_megatron.policy import platform

platform.prepare()

from copd_megatron.policy.fp8 import NO_FP8, Fp8Choice  # noqa: E402
from copd_megatron.policy.layout import Layout  # noqa: E402
from copd_megatron.policy.qwen3_vl.config import (  # noqa: E402
    HfConfig,
    Precision,
    Recompute,
    load_config,
    settings,
    torch_dtype,
)
from copd_megatron.policy.qwen3_vl.model import Qwen3VLModel  # noqa: E402

__all__ = ["Qwen3VLModel", "build_model", "build_shard"]


def build_model(
    source: str | os.PathLike[str] | HfConfig,
    layout: Layout,
    precision: Precision,
    recompute: Recompute = "none",
    fp8: Fp8Choice = NO_FP8,
) -> list[Qwen3VLModel]:
    """This process's part of the model, randomly initialised, on its device: one chunk per virtual pipeline stage.

    `source` is a Hugging Face folder, of which only config.json is read, or a configuration. `layout.initialize` must
    have been called. `recompute` and `fp8` are as in `settings`. Weights come
    from `copd_megatron.weights.mapping.to_megatron`. ConfigError if the layout does not fit the model.
    """
    return [chunk.to(device=platform.device()) for chunk in build_shard(source, layout, precision, recompute, fp8)]


def build_shard(
    source: str | os.PathLike[str] | HfConfig,
    layout: Layout,
    precision: Precision,
    recompute: Recompute = "none",
    fp8: Fp8Choice = NO_FP8,
) -> list[Qwen3VLModel]:
    """`build_model` where torch creates tensors: under `torch.device("meta")` a shard of any size takes no memory."""
    from megatron.core import parallel_state

    built = settings(load_config(source), layout, precision, recompute, fp8)
    chunks = []
    for number in range(layout.vpp):
        vp_stage = number if layout.vpp > 1 else None
        model = Qwen3VLModel(
            built,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        chunks.append(model.to(dtype=torch_dtype(precision)))
    return chunks
