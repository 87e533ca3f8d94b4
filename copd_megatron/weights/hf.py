"""Hugging Face model folders, read and written tensor by tensor.

Reading maps the files into memory, so a tensor costs nothing until it is used. Writing holds one shard at a time. A
folder is written whole or not at all (out_folder.py).
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from copd_megatron.errors import WeightsError
from copd_megatron.files import write_atomic
from copd_megatron.weights.families.qwen3_vl_moe import as_published
from copd_megatron.weights.out_folder import whole_folder

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30

# What belongs to a model besides its weights. Code (*.py) is left out: it would run at load time.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


class HfFolder:
    """A Hugging Face folder with safetensors weights, one file or several with an index.

    Raises WeightsError if the folder is missing, has only pickled weights, or a file of it is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._shards = {name: _open_shard(self.path / name) for name in self._shard_names()}
        self._shard_of = {tensor: shard for shard, file in self._shards.items() for tensor in file.keys()}  # noqa: SIM118
        self._check_index()

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._shard_of)

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor called `name`, mapped from the file: read when touched, not to be written to.

        Of two forms in which a family's tensors are found on disk, this is the published one.
        """
        if name not in self._shard_of:
            near = difflib.get_close_matches(name, self._shard_of, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise WeightsError(f"{self.path}: there is no tensor {name}{hint}")
        return as_published(name, self._shards[self._shard_of[name]].get_tensor(name), self.config)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All (name, tensor) pairs, sorted by name."""
        return ((name, self.tensor(name)) for name in self.names())

    def shards(self) -> list[str]:
        """Names of the weights' files, sorted."""
        return sorted(self._shards)

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor; nothing but the header is read."""
        return self.tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor; nothing but the header is read."""
        return self.tensor(name).dtype

    def let_go(self) -> None:
        """Give back the memory of what has been read: pages of a mapped file stay with the process until it is closed.
        Tensors that are still in use keep theirs."""
        self._shards = {name: _open_shard(self.path / name) for name in self._shards}

    def _shard_names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            self._index: dict[str, str] | None = self._read_index()
            return sorted(set(self._index.values()))
        self._index = None
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        found = sorted(
            file.name for file in self.path.iterdir() if file.suffix in {".safetensors", ".bin", ".pt", ".pth"}
        )
        if any(name.endswith(".safetensors") for name in found):
            raise WeightsError(f"{self.path}: expected {SINGLE} or {INDEX}, found {_some(found)}: the index is missing")
        if found:
            raise WeightsError(
                f"{self.path}: only pickled weights ({_some(found)}); reading them could run foreign code. "
                "Save the model as safetensors first: model.save_pretrained(folder)"
            )
        raise WeightsError(f"{self.path}: no weights here; expected {SINGLE} or {INDEX}")

    def _read_index(self) -> dict[str, str]:
        content = _read_json(self.path / INDEX)
        index = content.get("weight_map")
        if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
            raise WeightsError(f"{self.path / INDEX}: expected a `weight_map` from tensor names to file names")
        if outside := sorted({shard for shard in index.values() if Path(shard).name != shard}):
            raise WeightsError(f"{self.path / INDEX}: names files outside the folder: {_some(outside)}")
        return index

    def _check_index(self) -> None:
        if self._index is None:
            return
        for name, shard in self._index.items():
            if self._shard_of.get(name) != shard:
                raise WeightsError(f"{self.path / shard}: tensor {name} is missing, although {INDEX} promises it")
        if unlisted := sorted(set(self._shard_of) - set(self._index)):
            raise WeightsError(f"{self.path / INDEX}: does not list tensors that the files hold: {_some(unlisted)}")


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face folder. Raises WeightsError if there is none or it is not a JSON object."""
    if not folder.is_dir():
        raise WeightsError(f"{folder}: no such folder; expected a Hugging Face folder with config.json and {SINGLE}")
    return _read_json(folder / "config.json")


def write_folder(
    out: str | os.PathLike[str],
    tensors: Iterable[tuple[str, torch.Tensor]],
    like: str | os.PathLike[str],
    max_shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write `tensors` as a Hugging Face folder, with the configuration, tokenizer and processor files of `like`.

    Tensors are taken one by one and held until their shard of at most `max_shard_bytes` (or a single larger tensor) is
    full. Raises WeightsError if `out` has content and `overwrite` is off, or if it cannot be written; `out` is then as
    it was before.
    """
    read_config(Path(like))
    with whole_folder(out, marker="config.json", overwrite=overwrite) as folder:
        copy_model_files(like, folder)
        shards: list[list[str]] = []
        total = 0
        for shard in _shards(tensors, max_shard_bytes):
            total += sum(tensor.nbytes for tensor in shard.values())
            shards.append(sorted(shard))
            _save(shard, folder / shard_file(len(shards), 0))
        _name_shards(folder, shards, total)


def copy_model_files(source: str | os.PathLike[str], target: Path) -> None:
    """Copy everything but weights and code of a Hugging Face folder."""
    for name in MODEL_FILES:
        file = Path(source) / name
        if file.is_dir():
            shutil.copytree(file, target / name)
        elif file.exists():
            shutil.copyfile(file, target / name)


def _shards(tensors: Iterable[tuple[str, torch.Tensor]], max_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    """Group tensors, in the order given, into shards of at most `max_bytes`."""
    seen: set[str] = set()
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if name in seen:
            raise WeightsError(f"tensor {name} was given twice")
        seen.add(name)
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    if not seen:
        raise WeightsError("there are no tensors to write")
    yield shard


def _save(shard: dict[str, torch.Tensor], path: Path) -> None:
    # Tied weights share memory, which a safetensors file cannot express: each name gets a copy of its own.
    owner: dict[int, str] = {}
    for name, tensor in shard.items():
        if owner.setdefault(tensor.untyped_storage().data_ptr(), name) != name:
            shard[name] = tensor.clone()
    save_file(shard, path, metadata={"format": "pt"})
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def shard_file(number: int, count: int) -> str:
    """What shard `number`, from 1, of `count` is called."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    """Give shards their final names, now that their count is known, and write the index."""
    count = len(shards)
    if count == 1:
        (folder / shard_file(1, 0)).rename(folder / SINGLE)
        return
    for number in range(1, count + 1):
        (folder / shard_file(number, 0)).rename(folder / shard_file(number, count))
    write_index(folder, shards, total)


def write_index(folder: Path, shards: Sequence[Sequence[str]], total: int) -> None:
    """Write the index of `shards`, the names of the tensors in each, with `total` bytes of tensors."""
    count = len(shards)
    places = {name: shard_file(number, count) for number, names in enumerate(shards, 1) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    write_atomic(folder / INDEX, json.dumps(index, indent=2) + "\n")


def _open_shard(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: is missing, although {INDEX} lists it") from error
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path}: is damaged or cut short ({error}); fetch or write it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path}: is missing; expected a Hugging Face folder with config.json and {SINGLE}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
