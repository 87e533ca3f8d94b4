"""Samples for supervised learning: a demonstration is a rollout that somebody else has made."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from copd_megatron.data.capability import Source
from copd_megatron.data.example import Example
from copd_megatron.data.prompts import PromptBuilder
from copd_megatron.data.sampler import Sampler
from copd_megatron.errors import DataError
from copd_megatron.policy.batching import Sample
from copd_megatron.rollout.types import Prompt, Rollout


class DemonstrationBatches:
    """This rank's slices of the batches, in an order that depends on the seed alone.

    A batch has `batch` examples of every capability; the `replicas` data-parallel ranks take disjoint slices of equal
    size, which together are what a single rank would take.
    """

    def __init__(
        self, sources: Mapping[str, Source], builder: PromptBuilder, batch: int, seed: int, rank: int, replicas: int
    ) -> None:
        self._sources = sources
        self._builder = builder
        self._share = batch // replicas
        self._samplers = {
            name: Sampler(len(source), seed, f"sft/{name}", rank, replicas) for name, source in sources.items()
        }

    def draw(self) -> list[Sample]:
        """Samples of the next update. Raises DataError for an example that cannot be learned from."""
        samples = []
        for name, source in self._sources.items():
            examples = [source[index] for index in self._samplers[name].draw(self._share)]
            prompts, refused = self._builder.build_many(examples, name)
            if refused:
                raise DataError(f"{refused[0].uid}: {refused[0].reason}")
            samples += [self._sample(example, prompt) for example, prompt in zip(examples, prompts, strict=True)]
        return samples

    def _sample(self, example: Example, prompt: Prompt) -> Sample:
        if example.response is None:
            raise DataError(
                f"{example.uid}: there is no demonstration to learn from; name its field in `fields.response`, or give "
                "conversations in which the assistant has the last word"
            )
        tokens = self._builder.response_token_ids(example.response)
        return Sample(Rollout(prompt, tokens, torch.zeros(len(tokens)), "stop", 0, example.response))
