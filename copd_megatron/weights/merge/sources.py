"""Where the models to merge come from: anything that knows its tensors' names and forms and reads slices of them."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from copd_megatron.weights.crew import ALONE, Crew
from copd_megatron.weights.families.qwen3_vl_moe import as_published
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.tensor_files import Form, TensorReader


class Source(Protocol):
    """A model. Threads may read from it at the same time."""

    label: str
    """What error messages call it."""
    config: dict[str, Any]
    """Its config.json."""

    def names(self) -> Collection[str]:
        """Names of all tensors, in the order in which reading them is cheapest."""

    def form(self, name: str) -> Form:
        """Number format and shape of a tensor."""

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n] with elements start … start + n of the flattened tensor."""

    def forget(self, name: str) -> None:
        """The tensor is not needed any more."""

    def identity(self) -> Any:
        """Something that can be written as JSON and changes when the model does."""

    def close(self) -> None:
        """Let go of files."""


class FolderSource:
    """A Hugging Face folder, whose tensors have the published form whichever way round they lie on disk.

    Raises WeightsError if the folder is missing, has only pickled weights, or a file of it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        folder = HfFolder(path)
        self.label = str(path)
        self.config = folder.config
        self._readers = {file: TensorReader(path / file) for file in folder.shards()}
        self._of = {name: reader for reader in self._readers.values() for name in reader.forms}
        # What a tensor would be if it were read whole, without its memory.
        published = {
            name: as_published(name, torch.empty(form.shape, device="meta"), self.config)
            for name, form in ((name, reader.forms[name]) for name, reader in self._of.items())
        }
        self._turned = {name for name, tensor in published.items() if not tensor.is_contiguous()}
        self._forms = {
            name: Form(self._of[name].forms[name].dtype, tuple(tensor.shape)) for name, tensor in published.items()
        }
        self._lately = threading.local()

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._forms.keys()

    def form(self, name: str) -> Form:
        """Number format and published shape of a tensor."""
        return self._forms[name]

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n] with elements start … start + n of the flattened tensor in its published form."""
        if name not in self._turned:
            self._of[name].read(name, start, out)
            return
        # Stacked matrices [experts, inputs, outputs] that lie transposed: one matrix is held at a time.
        _, rows, columns = self._forms[name].shape
        done = 0
        while done < out.numel():
            number, first = divmod(start + done, rows * columns)
            part = self._matrix(name, number, rows, columns)[first : first + out.numel() - done]
            out[done : done + part.numel()] = part
            done += part.numel()

    def _matrix(self, name: str, number: int, rows: int, columns: int) -> torch.Tensor:
        """Matrix `number` of a stack, flattened in its published form; each thread keeps its last one."""
        if getattr(self._lately, "key", None) != (name, number):
            stored = torch.empty(columns * rows, dtype=self._forms[name].dtype)
            self._of[name].read(name, number * rows * columns, stored)
            self._lately.matrix = stored.view(columns, rows).t().reshape(-1)
            self._lately.key = (name, number)
        matrix: torch.Tensor = self._lately.matrix
        return matrix

    def forget(self, name: str) -> None:
        """Let its pages leave memory, if they were not there before."""
        self._lately.key = self._lately.matrix = None
        self._of[name].forget(name)

    def identity(self) -> Any:
        """Path, and of each file its size, time of change and the checksum of its header."""
        files = {}
        for name, reader in self._readers.items():
            facts = os.stat(reader.path)
            with open(reader.path, "rb") as file:
                header = hashlib.blake2b(file.read(reader.header_bytes), digest_size=16).hexdigest()
            files[name] = [facts.st_size, facts.st_mtime_ns, header]
        return {"path": str(Path(self.label).resolve()), "files": files}

    def close(self) -> None:
        """Close the files."""
        for reader in self._readers.values():
            reader.close()


class WholeTensors(Protocol):
    """A model that hands out tensors whole."""

    def names(self) -> Sequence[str]:
        """Names of all tensors."""

    def shape(self, name: str) -> Sequence[int]:
        """Shape of a tensor."""

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor."""

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor."""


class WholeSource:
    """A model that can only be read tensor by tensor: each is held, by one thread after the other, while it is sliced.

    `identity` must change when the model does.
    """

    def __init__(self, label: str, model: WholeTensors, config: dict[str, Any], identity: Any) -> None:
        self.label = label
        self.config = config
        self._model = model
        self._identity = identity
        self._forms = {name: Form(model.dtype(name), tuple(model.shape(name))) for name in model.names()}
        self._lock = threading.Lock()
        self._lately = threading.local()

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self._forms.keys()

    def form(self, name: str) -> Form:
        """Number format and shape of a tensor."""
        return self._forms[name]

    def read(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` [n] with elements start … start + n of the flattened tensor."""
        if getattr(self._lately, "name", None) != name:
            self._lately.tensor = None
            with self._lock:
                self._lately.tensor = self._model.tensor(name).detach().reshape(-1)
            self._lately.name = name
        out.copy_(self._lately.tensor[start : start + out.numel()])

    def forget(self, name: str) -> None:
        """Let go of it."""
        self._lately.name = self._lately.tensor = None

    def identity(self) -> Any:
        """As given."""
        return self._identity

    def close(self) -> None:
        """The model belongs to the caller."""


def open_source(path: Path, base: Path | None = None, trust: bool = False, crew: Crew = ALONE) -> Source:
    """The model in the folder `path`: Hugging Face's safetensors, or a Megatron distributed checkpoint of any layout.

    Of the latter, `base` is the Hugging Face folder that gives the configuration if it has none of its own, and with
    `trust` it is read without a valid manifest, whose checksums the processes of `crew` share. Collective. Raises
    WeightsError if `path` is neither, or damaged, or not trusted.
    """
    if not (path / "metadata.json").is_file() or (path / "config.json").exists():
        return crew.together(lambda: FolderSource(path))
    from copd_megatron.weights.megatron_source import HF_FILES, MegatronSource

    model = MegatronSource(path, None if (path / HF_FILES).is_dir() else base, trust, crew)
    return WholeSource(str(path), model, model.config, _identity(path))


def _identity(checkpoint: Path) -> Any:
    """Path, and of each file its size and time of change."""
    facts = {str(file.relative_to(checkpoint)): file.stat() for file in sorted(checkpoint.rglob("*")) if file.is_file()}
    return {
        "path": str(checkpoint.resolve()),
        "files": {name: [found.st_size, found.st_mtime_ns] for name, found in facts.items()},
    }
