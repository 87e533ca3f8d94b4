"""What a model is evaluated on: one suite per capability, from the mini suite or from a run description."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from copd_megatron.config import RunConfig
from copd_megatron.data.capability import Source, open_capability
from copd_megatron.data.mini import MiniSource, MiniTask
from copd_megatron.data.mini.task import Modality
from copd_megatron.rollout.types import Prompt

MODALITIES: dict[str, tuple[Modality, ...]] = {"mini": ("text", "image"), "mini-video": ("text", "image", "video")}
"""Names of suites, and what they ask of the mini suite."""


@dataclass(frozen=True)
class Suite:
    """The first `size` examples of `source`, which test `capability`; `group_of` tells kinds of problems apart."""

    capability: str
    source: Source
    size: int
    group_of: Callable[[Prompt], str] | None = None


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
        capability = open_capability(branch, config.data, seed, problems)
        source = capability.test if config.eval.split == "test" else capability.validation
        if source is not None:
            group_of = mini_operation if branch.data.mini is not None else None
            suites.append(Suite(branch.name, source, min(problems, len(source)), group_of))
    return suites


def describe(config: RunConfig) -> str:
    """One line on what the run's tests are, for the head of a table."""
    lines = []
    asked = {branch.data.mini.modality for branch in config.branches if branch.data.mini is not None}
    if asked:
        modalities = MODALITIES["mini-video" if "video" in asked else "mini"]
        lines.append(config.data.mini.describe(modalities))
    for branch in config.branches:
        source = branch.data.test if config.eval.split == "test" else branch.data.validation
        if source is not None:
            lines.append(f"{branch.name}: {source.path}")
    return "; ".join([*lines, *(["VALIDATION problems"] if config.eval.split == "validation" else [])])


def mini_operation(prompt: Prompt) -> str:
    """The operation a prompt of the mini suite asks for."""
    found = re.search(r"\b([a-z]{3})(?: \d+)?=", prompt.text)
    return found[1] if found else "other"
