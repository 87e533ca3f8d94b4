"""A Hugging Face folder on several suites."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from copd_megatron.errors import DataError
from copd_megatron.evaluate.benchmark import Grader, evaluate
from copd_megatron.evaluate.results import BenchmarkResult, CapabilityResult, ModelResult
from copd_megatron.evaluate.suites import Suite
from copd_megatron.rollout.types import Prompt, Sampling

if TYPE_CHECKING:
    from copd_megatron.data.prompts import PromptBuilder, Refusal

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """How models are asked, the same for all models of a table.

    `samples` per problem, where a suite does not say: 1 is greedy, more are drawn at `temperature` and averaged
    (avg@n). Lengths are in tokens.
    `max_rows` bounds the sequences generated at once, `seed` names the samples.
    """

    samples: int
    max_new_tokens: int
    max_prompt_tokens: int
    seed: int
    temperature: float = 1.0
    max_rows: int = 512

    def sampling(self, stop_token_ids: tuple[int, ...]) -> Sampling:
        """The engine's settings."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            stop_token_ids=stop_token_ids,
            temperature=self.temperature if self.samples > 1 else 0.0,
            n=self.samples,
        )


def evaluate_model(
    name: str, model_dir: str | os.PathLike[str], suites: Sequence[Suite], settings: EvalSettings, grader: Grader
) -> ModelResult:
    """Ask the model in the folder `model_dir` all problems of `suites`.

    Problems that cannot be made into prompts are left out, logged and counted. Raises WeightsError for a folder that
    cannot be used and DataError for a suite without a usable problem.
    """
    from copd_megatron.data.prompts import PromptBuilder, load_processor, stop_token_ids
    from copd_megatron.rollout.embedded import EmbeddedEngine

    engine = EmbeddedEngine(name, model_dir, max_rows=settings.max_rows)
    builder = PromptBuilder(load_processor(model_dir), settings.max_prompt_tokens)
    stops = stop_token_ids(model_dir, builder.tokenizer)
    found: dict[str, list[BenchmarkResult]] = {}
    for suite in suites:
        asked = settings if suite.samples is None else replace(settings, samples=suite.samples)
        refused: list[Refusal] = []
        result = evaluate(
            engine,
            suite.name,
            _prompts(suite, builder, refused),
            grader,
            asked.sampling(stops),
            settings.seed,
            group_of=suite.group_of,
        )
        found.setdefault(suite.capability, []).append(replace(result, refused=len(refused)))
    return ModelResult(name, tuple(CapabilityResult(capability, tuple(parts)) for capability, parts in found.items()))


def _prompts(suite: Suite, builder: PromptBuilder, refused: list[Refusal]) -> Iterator[Prompt]:
    """Those of the suite's problems that have one, decoded one by one; the others are added to `refused`."""
    for index in range(suite.size):
        prompts, left_out = builder.build_many([suite.source[index]], suite.capability)
        for uid, reason in left_out:
            logger.warning("%s left out: %s", uid, reason)
        refused += left_out
        yield from prompts
    if len(refused) == suite.size:
        raise DataError(f"{suite.name}: none of {suite.size} problems can be used; first: {refused[:1]}")
