"""What a model is evaluated on: one suite per benchmark, from the mini suite or from a run description."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from copd_megatron.config import RunConfig
from copd_megatron.data.capability import Source, open_benchmarks, open_capability
from copd_megatron.data.mini import MiniSource, MiniTask
from copd_megatron.data.mini.task import Modality
from copd_megatron.rollout.types import Prompt

MODALITIES: dict[str, tuple[Modality, ...]] = {"mini": ("text", "image"), "mini-video": ("text", "image", "video")}
"""Names of suites, and what they ask of the mini suite."""


@dataclass(frozen=True)
class Suite:
    """The first `size` examples of `source`, which test `capability`; `group_of` tells kinds of problems apart.

    `benchmark` is its name where the capability has several, and `samples` how many responses to a problem are averaged
    where it has a say in that.
    """

    capability: str
    source: Source
    size: int
    group_of: Callable[[Prompt], str] | None = None
    benchmark: str | None = None
    samples: int | None = None

    @property
    def name(self) -> str:
        """Of which results and random numbers are."""
        return self.capability if self.benchmark is None else f"{self.capability}/{self.benchmark}"


def mini_suites(task: MiniTask, modalities: Sequence[Modality], seed: int, problems: int) -> list[Suite]:
    """The test split of the mini suite in these modalities."""
    return [
        Suite(modality, MiniSource(task, modality, "test", seed, problems), problems, mini_operation)
        for modality in modalities
    ]


def run_suites(config: RunConfig, seed: int, problems: int) -> list[Suite]:
    """The data of `eval.split` of a run's branches, without those branches that have none."""
    suites = []
    for branch in config.branches:
        group_of = mini_operation if branch.data.mini is not None else None
        if config.eval.split == "validation":
            source = open_capability(branch, config.data, seed, problems).validation
            suites.append(Suite(branch.name, source, min(problems, len(source)), group_of))
            continue
        suites += [
            Suite(branch.name, one.source, min(problems, len(one.source)), group_of, one.name, one.samples)
            for one in open_benchmarks(branch, config.data, seed, problems)
        ]
    return suites


def describe(config: RunConfig) -> str:
    """One line on what the run's tests are, for the head of a table."""
    lines = []
    asked = {branch.data.mini.modality for branch in config.branches if branch.data.mini is not None}
    if asked:
        modalities = MODALITIES["mini-video" if "video" in asked else "mini"]
        lines.append(config.data.mini.describe(modalities))
    for branch in config.branches:
        test = {"": branch.data.test} if branch.data.test else branch.data.benchmarks
        sources = test if config.eval.split == "test" else {"": branch.data.validation}
        told = [f"{name} {source.path}".strip() for name, source in sources.items() if source is not None]
        if told:
            lines.append(f"{branch.name}: {', '.join(told)}")
    return "; ".join([*lines, *(["VALIDATION problems"] if config.eval.split == "validation" else [])])


def mini_operation(prompt: Prompt) -> str:
    """The operation a prompt of the mini suite asks for."""
    found = re.search(r"\b([a-z]{3})(?: \d+)?=", prompt.text)
    return found[1] if found else "other"
