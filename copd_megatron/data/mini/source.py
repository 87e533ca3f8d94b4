"""The mini suite as a data source: as many examples as one likes, each a function of its index."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np

from copd_megatron.data.example import Example
from copd_megatron.data.mini.questions import Question, gold_answer, split_of
from copd_megatron.data.mini.scans import clip, picture
from copd_megatron.data.mini.task import MiniTask, Modality, Split
from copd_megatron.errors import DataError
from copd_megatron.randomness import seed_for


class MiniSource:
    """`size` examples of one modality and split.

    Example i depends on (task, modality, split, seed, i) and nothing else, `size` included, so any worker can make
    any part. Questions and scans are disjoint between splits. The examples of `cold_start` carry demonstrations.
    """

    def __init__(self, task: MiniTask, modality: Modality, split: Split, seed: int, size: int) -> None:
        for name, value, known in (("modality", modality, get_args(Modality)), ("split", split, get_args(Split))):
            if value not in known:
                raise DataError(f"mini suite: {name} {value!r} is unknown; choose one of {', '.join(known)}")
        if size < 1:
            raise DataError(f"mini suite: size is {size}; a source needs at least 1 example")
        self.task, self.modality, self.split, self.seed, self.size = task, modality, split, seed, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.size:
            raise IndexError(f"mini suite: index {index} of a source of size {self.size}")
        rng = np.random.default_rng(seed_for(self.seed, "mini", self.modality, self.split, index))
        question = self._draw(rng)
        parts: list[dict[str, Any]] = [{"type": "text", "text": question.written(self.modality)}]
        if self.modality != "text":
            parts.insert(0, {"type": self.modality})
        shown = question.digits, self.split, self.task.noise, rng
        images = (picture(*shown),) if self.modality == "image" else ()
        videos = (clip(*shown),) if self.modality == "video" else ()
        return Example(
            uid=f"mini/{self.modality}/{self.split}/{self.seed}/{index}",
            messages=[{"role": "user", "content": parts}],
            answer=gold_answer(self._solve(question)),
            verifier="digits",
            images=images,
            videos=videos,
            response=self._demonstrate(question, rng) if self.split == "cold_start" else None,
        )

    def _draw(self, rng: np.random.Generator) -> Question:
        """A uniform draw from the split's questions."""
        operations, digits = self.task.asked(self.modality), self.task.digits
        while True:
            operation, number = divmod(int(rng.integers(len(operations) * 10**digits)), 10**digits)
            question = Question(operations[operation], tuple(map(int, f"{number:0{digits}d}")))
            if split_of(question) == self.split:
                return question

    def _demonstrate(self, question: Question, rng: np.random.Generator) -> str:
        right = bool(rng.random() < self.task.quality(question.operation, self.modality))
        return question.respond(self._solve(question, right))

    def _solve(self, question: Question, right: bool = True) -> int | tuple[int, ...]:
        return question.solve(self.task.ordinary(question.operation, self.modality) == right)
