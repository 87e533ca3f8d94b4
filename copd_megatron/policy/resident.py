"""Teachers in the student's own trainer: a second model of the same layout, filled with a peer's published weights.

It has no optimizer and no gradients. Of several teachers one at a time is in it: each in turn goes through the
micro-batches that are its own, and leaves a `Lesson` with every one. For losses over the whole vocabulary a lesson also
keeps the last hidden states, 2·H bytes per response token in bfloat16, and makes logits of them only when the loss of
that micro-batch is computed: with V = 151,936 and H = 2,560 a sixtieth of what the logits of all of them would take.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial

import torch

from copd_kernels.topk import topk
from copd_megatron.objectives.token_stats import token_stats
from copd_megatron.policy import layout
from copd_megatron.policy.packed import Lesson, MicroBatch
from copd_megatron.policy.qwen3_vl import Qwen3VLModel
from copd_megatron.policy.schedule import forward_pass
from copd_megatron.weights import mapping

Published = Callable[[str, int], AbstractContextManager[Mapping[str, torch.Tensor]]]
"""(branch, version) to its Hugging Face named weights, read one by one (`Snapshots.open`)."""


class ResidentTeachers:
    """The teachers of one branch, on its gang of processes. `teach` is collective, as `Policy.update` is."""

    def __init__(
        self,
        model: Sequence[Qwen3VLModel],
        names: Sequence[str],
        published: Published,
        top_k: int,
        temperature: float,
        whole_vocabulary: bool,
    ) -> None:
        """`model`, fresh from `build_model`, is that of the student; teacher number i is called `names[i]`.

        A lesson has the `top_k` likeliest tokens, at most 128, at `temperature`; with `whole_vocabulary` all logits.
        """
        self._model = model
        self._names = names
        self._published = published
        self._top_k = top_k
        self._temperature = temperature
        self._whole = whole_vocabulary
        self._holds: tuple[str, int] | None = None
        for chunk in model:
            chunk.stops_before_output_layer = True

    def teach(self, batches: Sequence[MicroBatch], version: int) -> list[MicroBatch]:
        """The micro-batches, each of one source (`pack(…, by_source=True)`), with the lessons of their teachers as they
        are after `version` updates. Stages without logits get no lessons and need none.

        Raises WeightsError if a teacher has not published that version.
        """
        taught = list(batches)
        for index, name in enumerate(self._names):
            self._fill(name, version)
            own = [number for number, batch in enumerate(batches) if int(batch.signals.source[0]) == index]
            use = partial(self._lesson, self._output_weight())
            lessons = forward_pass(self._model, [batches[number] for number in own], use)
            # Earlier stages have no logits and so no lessons, hence not strict.
            for number, lesson in zip(own, lessons, strict=False):
                taught[number] = replace(taught[number], lesson=lesson)
        return taught

    def _fill(self, name: str, version: int) -> None:
        if self._holds == (name, version):
            return
        self._holds = None
        with self._published(name, version) as weights:
            mapping.to_megatron(weights, self._model)
        self._holds = (name, version)

    def _output_weight(self) -> torch.Tensor | None:
        """The output layer's weight, which has to outlast the next teacher's arrival if logits are made later."""
        if not layout.is_last_stage():
            return None
        weight = self._model[-1].output_weight.detach()
        return weight.clone() if self._whole and len(self._names) > 1 else weight

    def _lesson(self, weight: torch.Tensor | None, batch: MicroBatch, hidden: torch.Tensor) -> Lesson:
        last, temperature = self._model[-1], self._temperature
        logits = last.project(hidden, weight)
        size = logits.shape[1] if last.vocabulary is None else last.vocabulary.size
        ids = topk(logits, min(self._top_k, size), temperature, vocabulary=last.vocabulary).ids
        stats = token_stats(logits, batch.targets, temperature, ids, last.vocabulary)
        later = partial(_without_gradient, last, hidden, weight) if self._whole else None
        return Lesson(stats.logprob, ids, stats.top_logprobs, stats.tail, later)


@torch.no_grad()
def _without_gradient(model: Qwen3VLModel, hidden: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return model.project(hidden, weight)
