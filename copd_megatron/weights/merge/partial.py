"""The folder in which a merged model grows until it is whole: `.NAME.partial`, beside NAME.

    .NAME.partial/
        model-00001-of-00003.safetensors, …    shards, at their final size from the beginning
        .merge/recipe.json                     what is merged and how
        .merge/SHARD.json                      checksums of a finished shard's tensors, and what was measured on them
        .merge/lock                            held by the process at work

What is killed leaves it behind. The same merge then keeps its finished shards; another one starts anew. The folder
takes NAME when it is complete, so that there is never half a model under that name.
"""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from copd_megatron.errors import WeightsError
from copd_megatron.files import sync_folder, write_atomic
from copd_megatron.weights.hf import copy_model_files
from copd_megatron.weights.hf_shards import Shard, name_shards
from copd_megatron.weights.out_folder import take_place
from copd_megatron.weights.tensor_files import TensorReader, raw_bytes

logger = logging.getLogger(__name__)

_VERIFIED = 2**20  # bytes read at once


class PartialFolder:
    """`.NAME.partial` for the folder `out`, from its beginning to its end."""

    def __init__(self, out: Path) -> None:
        self.out = out.absolute()
        self.path = self.out.with_name(f".{self.out.name}.partial")
        self._state = self.path / ".merge"

    def bytes_to_come(self, shards: list[Shard]) -> int:
        """What the shards will take on disk beyond what they, or their forerunners, take now."""
        files = [(shard.nbytes, self.path / shard.file) for shard in shards]
        return sum(max(0, size - (file.stat().st_blocks * 512 if file.exists() else 0)) for size, file in files)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the folder to oneself. Raises WeightsError if another merge is at work in it."""
        self._state.mkdir(parents=True, exist_ok=True)
        with open(self._state / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise WeightsError(f"{self.path}: another merge is writing {self.out}; wait for it") from error
            except OSError:
                logger.debug("%s: this file system has no locks", self.path)
            yield

    def begin(self, recipe: Mapping[str, Any]) -> None:
        """Keep what a merge by the same `recipe` (JSON) has left; clear away what another one has."""
        file = self._state / "recipe.json"
        text = json.dumps(recipe, sort_keys=True) + "\n"
        before = file.read_text(encoding="utf-8") if file.is_file() else None
        if before == text:
            logger.info("%s: going on with a merge that was interrupted", self.path)
        elif before is not None:
            logger.warning("%s: an interrupted merge of other models or by another recipe; starting anew", self.path)
        for entry in (*self.path.iterdir(), *self._state.iterdir()):
            if entry in (self._state, self._state / "lock") or (before == text and _is_shard(entry)):
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        write_atomic(file, text)

    def finished(self, shard: Shard) -> dict[str, Any] | None:
        """What was recorded of a finished shard, by tensor; None if it is not finished, or not as it was written."""
        file = self._state / f"{shard.file}.json"
        try:
            records: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            with TensorReader(self.path / shard.file) as reader:
                whole = reader.forms == shard.forms and records.keys() == shard.forms.keys()
                if whole and all(_digest(reader, name) == records[name]["xxh3"] for name in shard.forms):
                    return records
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, WeightsError) as error:
            logger.warning("%s: %s", self.path / shard.file, error)
        logger.warning("%s: is not as it was written; it is made again", self.path / shard.file)
        return None

    def record(self, shard: Shard, records: Mapping[str, Any]) -> None:
        """A shard is finished and on disk."""
        write_atomic(self._state / f"{shard.file}.json", json.dumps(records) + "\n")

    def records(self, shards: list[Shard]) -> dict[str, Any]:
        """What was recorded of all shards, by tensor."""
        found: dict[str, Any] = {}
        for shard in shards:
            found |= json.loads((self._state / f"{shard.file}.json").read_text(encoding="utf-8"))
        return found

    def furnish(self, shards: list[Shard], like: Path) -> None:
        """Add index, configuration, tokenizer and processor of the folder `like`: from now on the folder can be read.

        Raises ValueError if a shard is not recorded as finished.
        """
        if missing := [shard.file for shard in shards if not (self._state / f"{shard.file}.json").is_file()]:
            raise ValueError(f"{self.path}: not finished: {', '.join(missing)}")
        copy_model_files(like, self.path)
        name_shards(self.path, shards)
        sync_folder(self.path)

    def complete(self) -> None:
        """Take the place of `out`."""
        shutil.rmtree(self._state)
        take_place(self.path, self.out)


def _is_shard(file: Path) -> bool:
    """Or the record of one."""
    return file.name.removesuffix(".json").endswith(".safetensors")


def _digest(reader: TensorReader, name: str) -> str:
    form = reader.forms[name]
    summed = xxhash.xxh3_64()
    step = _VERIFIED // form.dtype.itemsize
    buffer = torch.empty(min(step, form.numel), dtype=form.dtype)
    for start in range(0, form.numel, step):
        part = buffer[: form.numel - start]
        reader.read(name, start, part)
        summed.update(raw_bytes(part))
    return summed.hexdigest()
