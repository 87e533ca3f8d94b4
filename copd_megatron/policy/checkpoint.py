"""Checkpoints of a policy: model and optimizer with megatron-core's dist_checkpointing, the caller's state as JSON.

A checkpoint is written into a temporary folder, its manifest last, and then renamed. The manifest lists every file with
size and SHA-256; a folder without a manifest that fits is not a checkpoint. torch.distributed.checkpoint keeps its
index in a pickle, which can run code when it is read: `load` therefore reads nothing before every file has the checksum
that this module wrote. That protects against damage and mix-ups, not against someone who forges the manifest too: load
checkpoints of your own runs only; weights from elsewhere come in as safetensors.

    root/step_0000015/          one checkpoint
        manifest.json           written last
        state.json              the caller's state, one entry per rank
        common.pt, metadata.json, .metadata, __0_0.distcp, …     dist_checkpointing ("torch_dist")
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from copd_megatron.errors import CopdError
from copd_megatron.files import checksum, sync_folder, write_atomic
from copd_megatron.policy import platform
from copd_megatron.policy.manifest import MANIFEST, newest_valid, read_manifest, step_folder, valid_steps
from copd_megatron.policy.trainer import Policy

platform.prepare()

from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import (  # noqa: E402
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, is_main_replica  # noqa: E402
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy  # noqa: E402
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)

__all__ = ["load", "newest_valid", "prune", "save", "step_folder", "valid_steps"]

STATE = "state.json"
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
"""A format of sharded optimizer state that any layout can load; megatron-core's default cannot be saved here."""

MODEL_PARTS = ("text_config", "vision_config")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
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
)
"""What shapes a model, in its Hugging Face configuration."""

Value = TypeVar("Value")


def save(policy: Policy, folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `policy` and this rank's `state` (what JSON can hold) to `folder`. Collective over the gang.

    Raises CopdError, on every rank, if something cannot be written; `folder` is then absent, or what it was, and other
    checkpoints are untouched.
    """
    target = Path(folder).absolute()
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _on_first_rank(lambda: _empty(temporary))
        has_moments = any(_together(lambda: any(len(part.state) for part in policy.optimizer.chained_optimizers)))
        write_tensors(_sharded_state(policy, has_moments, loading=False), temporary)
        content = {
            "version": policy.version,
            "skipped_in_a_row": policy.skipped_in_a_row,
            "moments": has_moments,
            "saved_from": _description(policy),
            "ranks": _together(lambda: state),
        }
        _on_first_rank(lambda: write_atomic(temporary / STATE, json.dumps(content, indent=1)))
        files = _checksums(temporary)
        _on_first_rank(lambda: _finish(temporary, target, files))
    except (_Failed, CheckpointException) as error:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CopdError(
            f"{target}: the checkpoint could not be written ({_reason(error)}); older ones are untouched. Make room or "
            "choose another run_dir, and start again"
        ) from error


def load(policy: Policy, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Put `policy` into the state it was saved in, and return this rank's `state`. Collective over the gang.

    The layout may be another one than at the time of saving, if all ranks had saved the same `state`. Raises CopdError
    for a checkpoint that is incomplete, damaged or of another model, before anything is changed.
    """
    source = Path(folder).absolute()
    manifest = read_manifest(source)
    if manifest is None:
        raise CopdError(
            f"{source}: not a complete checkpoint: {MANIFEST} or a file that it lists is missing or cut short"
        )
    try:
        found = _checksums(source)
    except _Failed as error:
        raise CopdError(f"{source}: cannot be read ({error})") from error
    if damaged := [name for name, entry in manifest.items() if found.get(name) != entry]:
        raise CopdError(f"{source}: {', '.join(damaged)} differ from {MANIFEST}: damaged; use an older checkpoint")
    content = json.loads((source / STATE).read_text())
    state = _own_state(content["ranks"], source)
    for name, ours in _description(policy).items():
        if (theirs := content["saved_from"].get(name)) != ours:
            raise CopdError(f"{source}: was saved with {name} {theirs!r}, this run has {ours!r}")
    try:
        loaded = dist_checkpointing.load(_sharded_state(policy, content["moments"], loading=True), str(source))
    except (KeyError, CheckpointingException, CheckpointException) as error:
        raise CopdError(f"{source}: does not fit this run's model: {_reason(error)}") from error
    policy.model.module.load_state_dict(loaded["model"])
    if content["moments"]:
        policy.optimizer.load_state_dict(loaded["optimizer"])
    else:
        for part in policy.optimizer.chained_optimizers:
            part.state.clear()
        policy.optimizer.reload_model_params()
    policy.version = content["version"]
    policy.skipped_in_a_row = content["skipped_in_a_row"]
    return state


def prune(root: str | os.PathLike[str], keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and what interrupted writes have left. First rank only."""
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    kept = {step_folder(root, step) for step in valid_steps(root)[-keep:]}
    for folder in [*Path(root).glob("step_*"), *Path(root).glob(".step_*.tmp")]:
        if folder not in kept:
            # Renamed first: a removal that is interrupted must not leave something that looks like a checkpoint.
            doomed = folder.with_name(f".{folder.name.strip('.')}.tmp")
            folder.replace(doomed)
            shutil.rmtree(doomed)


class _Failed(Exception):
    """This rank or another one could not do its part."""


def _together(work: Callable[[], Value]) -> list[Value]:
    """Every rank's result of `work`; _Failed on every rank if it fails on one, so that none is left waiting."""
    outcome: tuple[Value | None, str | None]
    try:
        outcome = (work(), None)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        outcome = (None, str(error) or type(error).__name__)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failed := [reason for _, reason in outcomes if reason is not None]:
        raise _Failed(failed[0])
    return [value for value, _ in outcomes]


def _reason(error: BaseException) -> str:
    """What went wrong, without the stacks that torch adds."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({str(failure) for failure, _ in error.failures.values()}))
    return str(error)


def _on_first_rank(work: Callable[[], object]) -> None:
    _together(lambda: work() if dist.get_rank() == 0 else None)


def _description(policy: Policy) -> dict[str, Any]:
    """What must be the same when a checkpoint is loaded, under the names that the user gave it."""
    config = policy.hf_config.to_dict()
    sizes = {f"{part}.{key}": config[part][key] for part in MODEL_PARTS for key in SIZES if key in config[part]}
    precision = str(policy.model.config.params_dtype).removeprefix("torch.")
    return {"precision": precision, "optimizer.distributed": policy.settings.distributed, **sizes}


def _sharded_state(policy: Policy, moments: bool, loading: bool) -> dict[str, Any]:
    """What dist_checkpointing saves or loads: the model and, once there has been an update, Adam's moments."""
    model = policy.model.module.sharded_state_dict(metadata=SHARDING)
    state = {"model": model}
    if moments:
        state["optimizer"] = policy.optimizer.sharded_state_dict(model, is_loading=loading, metadata=SHARDING)
    return state


def write_tensors(state: dict[str, Any], folder: Path) -> None:
    """`dist_checkpointing.save` ("torch_dist"), but in this process.

    megatron-core's own writer forks a process per file and keeps a manager process for their results, which outlives a
    rank that is killed; and ranks wait forever for one that fails to write its part.
    """
    sharded, common = save_preprocess(state)
    _on_first_rank(lambda: get_default_save_common_strategy().save_common(common, folder))
    by_key: dict[str, list[ShardedBase]] = {}
    for item in nested_values(sharded):
        if is_main_replica(item.replica_id):
            key = item.unique_key if isinstance(item, ShardedObject) else item.key
            by_key.setdefault(key, []).append(item)
    torch.distributed.checkpoint.save(
        mcore_to_pyt_state_dict(by_key),
        storage_writer=FileSystemWriter(folder, sync_files=True),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
    )
    _on_first_rank(lambda: save_config(CheckpointingConfig("torch_dist", 1), str(folder)))


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest; the ranks share the reading."""

    def own_part() -> dict[str, dict[str, Any]]:
        names = sorted(file.name for file in folder.iterdir() if file.name != MANIFEST)
        mine = names[dist.get_rank() :: dist.get_world_size()]
        return {name: {"bytes": (folder / name).stat().st_size, "sha256": checksum(folder / name)} for name in mine}

    return {name: entry for part in _together(own_part) for name, entry in sorted(part.items())}


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(temporary: Path, target: Path, files: dict[str, dict[str, Any]]) -> None:
    write_atomic(temporary / MANIFEST, json.dumps({"files": files}, indent=1))
    if target.exists():
        replaced = target.with_name(f".{target.name}.old.tmp")
        shutil.rmtree(replaced, ignore_errors=True)
        target.replace(replaced)
        temporary.replace(target)
        shutil.rmtree(replaced)
    else:
        temporary.replace(target)
    sync_folder(target.parent)


def _own_state(states: Sequence[dict[str, Any]], source: Path) -> dict[str, Any]:
    """This rank's entry; where the number of ranks has changed, all entries must agree."""
    if len(states) == dist.get_world_size():
        return states[dist.get_rank()]
    if any(state != states[0] for state in states):
        raise CopdError(
            f"{source}: was saved by {len(states)} processes, each in a state of its own; this run has "
            f"{dist.get_world_size()}. Continue with {len(states)} processes"
        )
    return states[0]
