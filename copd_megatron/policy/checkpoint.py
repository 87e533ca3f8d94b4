"""Checkpoints of a policy: model and optimizer with megatron-core's dist_checkpointing, the caller's state as JSON.

A checkpoint is written into a temporary folder, its manifest last, and then renamed. The manifest lists every file with
size and SHA-256; a folder without a manifest that fits is not a checkpoint. torch.distributed.checkpoint keeps its
index in a pickle, which can run code when it is read: `load` therefore reads nothing before every file has the checksum
that this module wrote. That protects against damage and mix-ups, not against someone who forges the manifest too: load
checkpoints of your own runs only; weights from elsewhere come in as safetensors.

    root/step_0000015/          one checkpoint
        manifest.json           written last
        state.json              versions, random generators, and the caller's state, one entry per rank
        common.pt, metadata.json, .metadata, __0_0.distcp, …     dist_checkpointing ("torch_dist")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from copd_megatron.errors import CopdError, WeightsError
from copd_megatron.files import checksum, sync_folder, write_atomic
from copd_megatron.policy import platform
from copd_megatron.policy.async_writer import TensorWriting, write_tensors
from copd_megatron.policy.manifest import (
    MANIFEST,
    describe,
    newest_valid,
    problem,
    read_manifest,
    step_folder,
    valid_steps,
    write_manifest,
)
from copd_megatron.policy.random_state import random_state, set_random_state
from copd_megatron.policy.together import Failed, on_first_rank, reason_of, together
from copd_megatron.policy.trainer import Policy

platform.prepare()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402

__all__ = ["Saving", "load", "newest_valid", "save", "step_folder", "valid_steps", "write_tensors"]

STATE = "state.json"
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""A format of sharded optimizer state that any layout can load; megatron-core's default cannot be saved here."""

MODEL_PARTS = ("text_config", "vision_config")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "depth",
    "num_heads",
    "patch_size",
    "temporal_patch_size",
    "out_hidden_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
    "window_size",
    "fullatt_block_indexes",
)
"""What shapes a model, in its Hugging Face configuration."""


class Saving:
    """A checkpoint on its way to disk. Every rank of the gang makes one; all methods are collective.

    With `background` training may go on as soon as the constructor has returned: it has copied what it needs.
    """

    def __init__(
        self,
        policy: Policy,
        folder: str | os.PathLike[str],
        state: dict[str, Any],
        background: bool = True,
        attached: Mapping[str, Path] | None = None,
    ) -> None:
        """Begin to write `policy` and this rank's `state` (what JSON can hold) to `folder`.

        `attached` are files that rank 0 adds under the given names; they must not be written to later. Raises
        CopdError, on every rank, if a rank cannot begin.
        """
        self._target = Path(folder).absolute()
        self._temporary = self._target.with_name(f".{self._target.name}.tmp")
        try:
            on_first_rank(self._make_room)
            has_moments = any(together(lambda: any(len(part.state) for part in policy.optimizer.chained_optimizers)))
            self._content = {
                "version": policy.version,
                "skipped_in_a_row": policy.skipped_in_a_row,
                "moments": has_moments,
                "saved_from": _description(policy),
                "layout": _layout(),
                "random": together(random_state),
                "ranks": together(lambda: state),
            }
            tensors = _sharded_state(policy, has_moments, loading=False)
            self._tensors = TensorWriting(tensors, self._temporary, background, attached)
        except (Failed, CheckpointException) as error:
            raise self._failure(error) from error

    def done_everywhere(self) -> bool:
        """Whether `finish` would not have to wait for a writer."""
        return self._tensors.done_everywhere()

    def finish(self) -> None:
        """Wait for the writers and declare the checkpoint complete.

        Raises CopdError, on every rank, if something could not be written; `folder` is then absent, or what it was, and
        other checkpoints are untouched.
        """
        try:
            files = self._tensors.finish()
            on_first_rank(lambda: self._complete(files))
        except (Failed, CheckpointException) as error:
            raise self._failure(error) from error

    def _make_room(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _complete(self, files: dict[str, dict[str, Any]]) -> None:
        write_atomic(self._temporary / STATE, json.dumps(self._content, indent=1))
        write_manifest(self._temporary, {**files, STATE: describe(self._temporary / STATE)})
        if self._target.exists():
            replaced = self._target.with_name(f".{self._target.name}.old.tmp")
            shutil.rmtree(replaced, ignore_errors=True)
            self._target.replace(replaced)
            self._temporary.replace(self._target)
            shutil.rmtree(replaced)
        else:
            self._temporary.replace(self._target)
        sync_folder(self._target.parent)

    def _failure(self, error: BaseException) -> CopdError:
        if dist.get_rank() == 0:
            shutil.rmtree(self._temporary, ignore_errors=True)
        return CopdError(
            f"{self._target}: the checkpoint could not be written ({reason_of(error)}); older ones are untouched. Make "
            "room or choose another run_dir, and start again"
        )


def save(policy: Policy, folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write a checkpoint and return when it is complete; see `Saving`. Collective over the gang."""
    Saving(policy, folder, state, background=False).finish()


def load(policy: Policy, folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Put `policy` into the state it was saved in; the `state` of every rank at that time. Collective over the gang.

    The layout may be another one than at the time of saving; in the same layout the default random generators go on
    where they stood. Raises WeightsError for a checkpoint that is incomplete, damaged, newer than this version or of
    another model, before anything is changed.
    """
    source = Path(folder).absolute()
    try:
        found = together(lambda: _own_share_of_problems(source))
    except Failed as error:
        raise WeightsError(f"{source}: cannot be read ({error})") from error
    if problems := sorted({line for part in found for line in part}):
        raise WeightsError(f"{source}: not a usable checkpoint: {'; '.join(problems)}")
    content = json.loads((source / STATE).read_text())
    for name, ours in _description(policy).items():
        if (theirs := content["saved_from"].get(name)) != ours:
            raise WeightsError(f"{source}: was saved with {name} {theirs!r}, this run has {ours!r}")
    try:
        loaded = dist_checkpointing.load(_sharded_state(policy, content["moments"], loading=True), str(source))
    except (KeyError, CheckpointingException, CheckpointException) as error:
        raise WeightsError(f"{source}: does not fit this run's model: {reason_of(error)}") from error
    for key, chunk in _chunks(policy).items():
        chunk.load_state_dict(loaded[key])
    if content["moments"]:
        policy.optimizer.load_state_dict(loaded["optimizer"])
    else:
        for part in policy.optimizer.chained_optimizers:
            part.state.clear()
        policy.optimizer.reload_model_params()
    policy.version = content["version"]
    policy.skipped_in_a_row = content["skipped_in_a_row"]
    if content["layout"] == _layout():
        set_random_state(content["random"][dist.get_rank()])
    ranks: list[dict[str, Any]] = content["ranks"]
    return ranks


def _own_share_of_problems(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's folder; the ranks share the reading."""
    if wrong := problem(folder):
        return [wrong]
    files = read_manifest(folder) or {}
    mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
    return [
        f"{name} differs from its checksum in {MANIFEST}"
        for name in mine
        if checksum(folder / name) != files[name]["sha256"]
    ]


def _description(policy: Policy) -> dict[str, Any]:
    """What must be the same when a checkpoint is loaded, under the names that the user gave it."""
    config = policy.hf_config.to_dict()
    # A model that takes text alone has its sizes at the top.
    parts = {f"{part}.": config[part] for part in MODEL_PARTS if part in config} or {"": config}
    sizes = {f"{part}{key}": values[key] for part, values in parts.items() for key in SIZES if key in values}
    precision = str(policy.model.config.params_dtype).removeprefix("torch.")
    return {
        "precision": precision,
        "optimizer.distributed": policy.settings.distributed,
        # Divided experts have an optimizer of their own, whose state no other layout can take over.
        "parallel.ep > 1": policy.model.config.expert_model_parallel_size > 1,
        **sizes,
    }


def _layout() -> dict[str, int]:
    """Who holds what; random generators are only given back to the same layout."""
    return {
        "world": dist.get_world_size(),
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "vpp": parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "etp": parallel_state.get_expert_tensor_parallel_world_size(),
    }


def _chunks(policy: Policy) -> dict[str, Any]:
    """This rank's parts of the model: one, or one per virtual pipeline stage under megatron-core's names for them."""
    modules = [chunk.module for chunk in policy.chunks]
    return {"model": modules[0]} if len(modules) == 1 else {f"model{n}": module for n, module in enumerate(modules)}


def _sharded_state(policy: Policy, moments: bool, loading: bool) -> dict[str, Any]:
    """What dist_checkpointing saves or loads: the model and, once there has been an update, Adam's moments."""
    sharding = dict(SHARDING)  # megatron-core puts the present process groups into it
    state = {key: chunk.sharded_state_dict(metadata=sharding) for key, chunk in _chunks(policy).items()}
    if moments:
        model = state["model"] if len(state) == 1 else dict(state)
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=sharding)
    return state
