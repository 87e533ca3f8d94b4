"""Published weights: one safetensors file per branch and version in the run's `snapshots/` folder.

This is how embedded and resident teachers get their weights: the peer publishes, the student's processes load them
into a second model. A snapshot can always be made again from a checkpoint, so it is renamed into place but not forced
to disk.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from copd_megatron.errors import WeightsError


class Snapshots:
    """The `snapshots/` folder of a run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def publish(self, branch: str, version: int, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Write the Hugging Face named weights that `branch` has after `version` updates."""
        target = self.file(branch, version)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in weights}, temporary)
        os.replace(temporary, target)

    def weights(self, branch: str, version: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The (name, tensor) pairs that `branch` published as `version`. Raises WeightsError if it has not."""
        with self.open(branch, version) as tensors:
            yield from tensors.items()

    @contextmanager
    def open(self, branch: str, version: int) -> Iterator[Mapping[str, torch.Tensor]]:
        """The same as a mapping, for the `with` block: a tensor is read when it is looked up, and not kept."""
        file = self.file(branch, version)
        if not file.is_file():
            raise WeightsError(f"{file}: branch {branch!r} has not published version {version}")
        with safe_open(file, framework="pt") as tensors:
            yield _Tensors(tensors)

    def forget(self, branch: str, keep: Collection[int]) -> None:
        """Delete what `branch` published except the versions in `keep`."""
        kept = {self.file(branch, version) for version in keep}
        for file in (self._folder / branch).glob("version_*"):
            if file not in kept:
                file.unlink(missing_ok=True)

    def file(self, branch: str, version: int) -> Path:
        """Where the weights of `branch` after `version` updates belong."""
        return self._folder / branch / f"version_{version:07d}.safetensors"


class _Tensors(Mapping[str, torch.Tensor]):
    """An open safetensors file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._names = dict.fromkeys(file.keys())

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._file.get_tensor(name)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
