"""The accuracy table of a run, `evaluation.json`: written by the evaluation, read by the report.

    {"task": str, "n": int, "seed": int, "notes": [str],
     "models": [{"name": str, "capabilities": {name: SCORE}, "overall": SCORE}]}
    SCORE: {"accuracy": a, "low": l, "high": h, "n": problems, "benchmarks": {name: SCORE}}

`benchmarks` are those of a capability that has several; its score is their unweighted mean.

Accuracies and the bounds of their 95% intervals are shares, 0 to 1.
"""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from copd_megatron.errors import CopdError

EVALUATION_FILE = "evaluation.json"


class Score(BaseModel):
    """An accuracy and its 95% interval."""

    model_config = ConfigDict(frozen=True)
    accuracy: float = Field(ge=0, le=1)
    low: float = Field(ge=0, le=1)
    high: float = Field(ge=0, le=1)
    n: int | None = Field(None, ge=0)
    benchmarks: dict[str, Score] = Field({})

    @model_validator(mode="after")
    def _ordered(self) -> Score:
        if not self.low <= self.accuracy <= self.high:
            raise ValueError(f"expected low ≤ accuracy ≤ high, found {self.low}, {self.accuracy}, {self.high}")
        return self


class ModelResult(BaseModel):
    """One model's row of the table."""

    model_config = ConfigDict(frozen=True)
    name: str
    capabilities: dict[str, Score]
    overall: Score | None = None


class Evaluation(BaseModel):
    """The whole table; keys it does not know are ignored."""

    model_config = ConfigDict(frozen=True)
    task: str
    n: int
    seed: int
    models: tuple[ModelResult, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        """How many problems there were."""
        scores = [score for model in self.models for score in model.capabilities.values()]
        several = any(score.benchmarks for score in scores)
        return f"at most {self.n:,} problems per benchmark" if several else f"{self.n:,} problems per capability"


def read_evaluation(run_dir: str | os.PathLike[str]) -> Evaluation | None:
    """The run's table; None where it has none yet. Raises CopdError that names every wrong field."""
    path = Path(run_dir) / EVALUATION_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Evaluation.model_validate_json(content)
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'file'}: {item['msg']}" for item in error.errors())
        raise CopdError(f"{path}: {found}. Evaluate the run again, or remove the file") from error
