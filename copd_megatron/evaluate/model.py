"""A Hugging Face folder on several suites."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from copd_megatron.data.capability import first
from copd_megatron.errors import DataError
from copd_megatron.evaluate.benchmark import CapabilityResult, Grader, evaluate
from copd_megatron.evaluate.intervals import Estimate, mean_of
from copd_megatron.evaluate.suites import Suite
from copd_megatron.rollout.types import Sampling

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalSettings:
    """How models are asked, the same for all models of a table.

    `samples` per problem: 1 is greedy, more are drawn at `temperature` and averaged (avg@n). Lengths are in tokens.
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


@dataclass(frozen=True)
class ModelResult:
    """A model's row of the table."""

    name: str
    capabilities: tuple[CapabilityResult, ...]

    @property
    def overall(self) -> Estimate:
        """Unweighted mean over the capabilities."""
        return mean_of([result.estimate for result in self.capabilities])


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
    sampling = settings.sampling(stop_token_ids(model_dir, builder.tokenizer))
    results = []
    for suite in suites:
        prompts, refused = builder.build_many(first(suite.source, suite.size), suite.capability)
        for uid, reason in refused:
            logger.warning("%s left out: %s", uid, reason)
        if not prompts:
            raise DataError(f"{suite.capability}: none of {suite.size} problems can be used; first: {refused[:1]}")
        results.append(
            evaluate(
                engine,
                suite.capability,
                prompts,
                grader,
                sampling,
                settings.seed,
                group_of=suite.group_of,
                refused=len(refused),
            )
        )
    return ModelResult(name, tuple(results))
