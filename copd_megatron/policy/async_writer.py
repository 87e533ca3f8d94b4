"""Sharded tensors on their way to disk while training goes on.

`dist_checkpointing.save` ("torch_dist") in three parts. The calling thread copies this rank's shards to host memory
and agrees with the other ranks on who writes what; a thread of this process then writes and sums up files; `finish`
puts the index beside them. The thread takes part in no collective operation, so it cannot disturb training's.

megatron-core's own asynchronous writer forks a process per file and keeps a manager process for their results, which
outlives a rank that is killed; and ranks wait forever for one that fails to write its part.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.utils import _DistWrapper

from copd_megatron.files import sync_folder, write_atomic
from copd_megatron.policy import platform
from copd_megatron.policy.manifest import Files, describe
from copd_megatron.policy.together import all_ranks, together

platform.prepare()

from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME  # noqa: E402
from megatron.core.dist_checkpointing.strategies.torch import (  # noqa: E402
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)

INDEX = ".metadata"


class TensorWriting:
    """A state dict being written to the empty folder `folder`. Every rank of the gang makes one, with its shards.

    With `background` the tensors may change as soon as the constructor has returned. `attached` are files that rank 0
    adds to the folder under the given names; they must not be written to later.
    """

    def __init__(
        self,
        state: dict[str, Any],
        folder: Path,
        background: bool = True,
        attached: Mapping[str, Path] | None = None,
    ) -> None:
        """Collective. Raises Failed or CheckpointException on every rank if one cannot begin."""
        self._folder = folder
        sharded, common = save_preprocess(state)
        own = [item for item in nested_values(sharded) if is_main_replica(item.replica_id)]
        if background:
            together(lambda: _copy_to_host(own))
        by_key: dict[str, list[ShardedBase]] = {}
        for item in own:
            by_key.setdefault(item.unique_key if isinstance(item, ShardedObject) else item.key, []).append(item)
        self._writer = FileSystemWriter(folder, sync_files=True)
        self._planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._metadata: Any = None
        self._plan = self._agree(mcore_to_pyt_state_dict(by_key))
        self._small: dict[str, bytes] = {}
        self._attached = tuple(attached or ())
        if dist.get_rank() == 0:
            self._small = {COMMON_STATE_FNAME: _serialised(common)}
        together(lambda: _attach(attached or {}, folder) if dist.get_rank() == 0 else None)
        self._results: list[Any] = []
        self._files: Files = {}
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        if background:
            self._thread.start()
        else:
            self._thread.run()

    def done_everywhere(self) -> bool:
        """Whether `finish` would not have to wait. Collective."""
        return all_ranks(not self._thread.is_alive())

    def finish(self) -> Files:
        """Wait for every rank's files, add the index; name to size and checksum of all. Collective.

        Raises Failed on every rank if one could not write its part.
        """
        parts = together(self._own_files)
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._results, gathered, dst=0)
        (index, *_) = together(lambda: self._write_index(gathered) if gathered is not None else {})
        return {name: entry for part in (*parts, index) for name, entry in part.items()}

    def _agree(self, tensors: dict[str, Any]) -> Any:
        """What this rank writes. Rank 0 also learns the whole (`_metadata`)."""
        ranks = _DistWrapper(None, use_dist=True, coordinator_rank=0)

        def own() -> Any:
            self._planner.set_up_planner(tensors, self._writer.storage_meta(), ranks.is_coordinator)
            self._writer.set_up_storage_writer(ranks.is_coordinator, rank=ranks.rank, use_collectives=True)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        def whole(plans: list[Any]) -> list[Any]:
            plans, self._metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        return self._planner.finish_plan(ranks.reduce_scatter("plan", own, whole))

    def _write(self) -> None:
        """In the thread: this rank's files, on disk, with their checksums."""
        try:
            self._results = self._writer.write_data(self._plan, self._planner).value()
            for name, content in self._small.items():
                write_atomic(self._folder / name, content)
            mine = [*self._small, *self._attached] if dist.get_rank() == 0 else []
            own = [file.name for file in self._folder.glob(f"__{dist.get_rank()}_*")]
            for name in self._attached if mine else ():
                _sync(self._folder / name)
            self._files = {name: describe(self._folder / name) for name in (*own, *mine)}
        except Exception as error:
            self._failure = error
        finally:
            del self._planner, self._plan  # and with them the copies

    def _own_files(self) -> Files:
        if self._thread.is_alive():
            self._thread.join()
        if self._failure is not None:
            raise RuntimeError(str(self._failure) or type(self._failure).__name__) from self._failure
        return self._files

    def _write_index(self, results: list[Any]) -> Files:
        self._writer.finish(self._metadata, results)
        write_atomic(self._folder / CONFIG_FNAME, json.dumps(asdict(CheckpointingConfig("torch_dist", 1))))
        sync_folder(self._folder)
        return {name: describe(self._folder / name) for name in (INDEX, CONFIG_FNAME)}


def write_tensors(state: dict[str, Any], folder: Path) -> None:
    """`dist_checkpointing.save` in this process: returns when everything is on disk. Collective."""
    TensorWriting(state, folder, background=False).finish()


def _copy_to_host(items: list[ShardedBase]) -> None:
    """Give shards copies of their tensors, which training cannot change."""
    for item in items:
        if isinstance(item, ShardedTensor):
            tensor = item.data.detach()
            # torch keeps page-locked memory that is given back, so only the first checkpoint pays for it.
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            item.data = copy.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()


def _serialised(common: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(common, buffer)
    return buffer.getvalue()


def _attach(files: Mapping[str, Path], folder: Path) -> None:
    for name, source in files.items():
        try:
            os.link(source, folder / name)
        except OSError:  # another file system
            shutil.copyfile(source, folder / name)


def _sync(file: Path) -> None:
    with open(file, "rb") as content:
        os.fsync(content.fileno())
