"""One branch's problems, whatever they come from: training prompts, validation for the probes, test for the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from copd_megatron.config.branches import BranchConfig, DataConfig
from copd_megatron.data.example import Example
from copd_megatron.data.mini import MiniSource
from copd_megatron.data.sources import open_source


class Source(Protocol):
    """A finite, indexable collection of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Capability:
    """What a branch is trained on, probed with and tested on."""

    name: str
    train: Source
    validation: Source
    test: Source | None


def open_capability(branch: BranchConfig, data: DataConfig, seed: int, test_size: int) -> Capability:
    """Open a branch's sources. Raises DataError where a file or a field is missing."""
    settings = branch.data
    if settings.mini is not None:
        sizes = {"train": data.mini_size, "validation": 4096, "test": test_size}
        train, validation, test = (
            MiniSource(task=data.mini, modality=settings.mini.modality, split=split, seed=seed, size=size)
            for split, size in sizes.items()
        )
        return Capability(branch.name, train, validation, test)
    assert settings.train is not None  # BranchData checks it
    train_source = open_source(settings.train)
    return Capability(
        name=branch.name,
        train=train_source,
        validation=open_source(settings.validation) if settings.validation else train_source,
        test=open_source(settings.test) if settings.test else None,
    )


def first(source: Source, count: int) -> Sequence[Example]:
    """The first `count` examples, or all if there are fewer."""
    return [source[index] for index in range(min(count, len(source)))]
