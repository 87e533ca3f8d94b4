"""One branch's problems, whatever they come from: training prompts, validation for the probes, test for the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from copd_megatron.config.branches import BranchConfig, DataConfig
from copd_megatron.data.example import Example
from copd_megatron.data.mini import MiniSource
from copd_megatron.data.sources import open_source

_VALIDATION_SIZE = 4096


class Source(Protocol):
    """A finite, indexable collection of examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Mixture:
    """All examples of several sources, in turn as long as each has some left."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        places = [np.arange(len(source)) for source in sources]
        origins = [np.full(len(source), number) for number, source in enumerate(sources)]
        turns = np.argsort(np.concatenate(places), kind="stable")
        self._places, self._origins = np.concatenate(places)[turns], np.concatenate(origins)[turns]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        return self._sources[int(self._origins[index])][int(self._places[index])]


@dataclass(frozen=True)
class Benchmark:
    """Test problems, with a name where a capability has several such, and `samples` per problem where it says so."""

    source: Source
    name: str | None = None
    samples: int | None = None


@dataclass(frozen=True)
class Capability:
    """What a branch is trained on, probed with and tested on."""

    name: str
    train: Source
    validation: Source
    benchmarks: tuple[Benchmark, ...]


def open_capability(branch: BranchConfig, data: DataConfig, seed: int, test_size: int) -> Capability:
    """Open a branch's sources. Raises DataError where a file or a field is missing."""
    settings = branch.data
    if settings.mixture:
        parts = [
            open_capability(branch.model_copy(update={"data": part}), data, seed, test_size)
            for part in settings.mixture
        ]
        train, validation = Mixture([part.train for part in parts]), Mixture([part.validation for part in parts])
        return Capability(branch.name, train, validation, benchmarks=())
    benchmarks = open_benchmarks(branch, data, seed, test_size)
    if settings.mini is not None:
        mini = _mini(branch, data, seed)
        return Capability(
            name=branch.name,
            train=mini(split="train", size=data.mini_size),
            validation=mini(split="validation", size=_VALIDATION_SIZE),
            benchmarks=benchmarks,
        )
    assert settings.train is not None  # BranchData checks it
    train_source = open_source(settings.train)
    return Capability(
        name=branch.name,
        train=train_source,
        validation=open_source(settings.validation) if settings.validation else train_source,
        benchmarks=benchmarks,
    )


def open_benchmarks(branch: BranchConfig, data: DataConfig, seed: int, test_size: int) -> tuple[Benchmark, ...]:
    """Open a branch's test data alone. Raises DataError where a file or a field is missing."""
    settings = branch.data
    if settings.mini is not None:
        return (Benchmark(_mini(branch, data, seed)(split="test", size=test_size)),)
    if settings.test is not None:
        return (Benchmark(open_source(settings.test)),)
    return tuple(Benchmark(open_source(one), name, one.samples) for name, one in settings.benchmarks.items())


def _mini(branch: BranchConfig, data: DataConfig, seed: int) -> partial[MiniSource]:
    assert branch.data.mini is not None
    return partial(MiniSource, data.mini, branch.data.mini.modality, seed=seed)


def first(source: Source, count: int) -> Sequence[Example]:
    """The first `count` examples, or all if there are fewer."""
    return [source[index] for index in range(min(count, len(source)))]
