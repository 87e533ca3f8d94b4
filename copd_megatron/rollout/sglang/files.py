"""Weights through files that this process and the servers both see: for servers that share nothing else with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from copd_megatron.files import write_atomic
from copd_megatron.rollout.sglang.client import Server
from copd_megatron.rollout.sglang.transport import STEP_SECONDS, Bucket, Transport, succeeded

_INDEX = "model.safetensors.index.json"


class Files(Transport):
    """One file per bucket in `folder`, which is there for the time of a hand-over alone; servers read it when all of it
    is written. `folder` must have the same path on their hosts."""

    def __init__(self, bucket_bytes: int, folder: Path) -> None:
        super().__init__(bucket_bytes)
        self._folder = folder
        self._files = 0
        self._places: dict[str, str] = {}

    def open(self) -> None:
        """An empty folder: what a hand-over that was killed has left must not be read as part of this one."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._files = 0
        self._places = {}

    async def begin(self, server: Server) -> None:
        """The server takes all weights in one step, so there is nothing to begin."""

    def load(self, bucket: Bucket) -> None:
        self._files += 1
        file = f"model-{self._files:05d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in bucket}, self._folder / file)
        self._places |= {name: file for name, _ in bucket}

    async def deliver(self, server: Server) -> None:
        """It is read in the end."""

    def close(self) -> None:
        write_atomic(self._folder / _INDEX, json.dumps({"metadata": {}, "weight_map": self._places}))

    async def end(self, server: Server) -> None:
        body = {"model_path": str(self._folder), "load_format": "safetensors", "flush_cache": False}
        succeeded(await server.post("/update_weights_from_disk", body, STEP_SECONDS))

    def clear(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
