"""What is measured on each model of a pilot study, problem by problem, and the files that keep it.

A file says of what it is, and one of other models, problems or settings is measured again.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from copd_megatron.errors import CopdError, DataError
from copd_megatron.files import write_atomic
from copd_megatron.pilot.settings import PilotSettings
from copd_megatron.randomness import seed_for

if TYPE_CHECKING:
    from copd_megatron.pilot.distances import Asking
    from copd_megatron.rollout.embedded import EmbeddedEngine

Pairs = tuple[tuple[float, float], ...]
"""(sum, count) of each problem."""


class Measurement(BaseModel):
    """The file.

    `of` says of what. `from_base` are a model's distances from the base on validation problems of its own capability.
    Of students there are also `from_teacher`, on those of the teacher's capability, with the KL from the base there as
    `kl_base`; and `test`, rewards and samples on the test problems of the teacher's capability.
    """

    model_config = ConfigDict(frozen=True)
    of: dict[str, Any]
    from_base: dict[str, Pairs]
    from_teacher: dict[str, Pairs] = {}
    test: Pairs = ()


def read_measurement(file: Path) -> Measurement | None:
    """What is in a file; None where there is none. Raises CopdError for a damaged one."""
    try:
        return Measurement.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CopdError(f"{file}: {where}: {first['msg']}. Remove the file, and it is measured again") from error


class Measuring:
    """Measures the models of one seed, all on the same problems and with the same random numbers."""

    def __init__(self, study: PilotSettings, seed: int) -> None:
        self._study = study
        self._seed = seed
        self._config = study.rlvr(seed, study.student.capability)
        teacher = study.teacher
        self._folders = {
            "base": Path(self._config.base),
            "teacher": study.model(seed, teacher.capability, teacher.updates),
        }

    def measure(self, capability: str, updates: int) -> bool:
        """Measure the model after so many updates on a capability; False if that was done already.

        Raises DataError without usable problems, WeightsError for a folder that cannot be used.
        """
        file = self._study.measurement(self._seed, capability, updates)
        folder = self._study.model(self._seed, capability, updates)
        of = self._identity(capability, folder)
        found = read_measurement(file)
        if found is not None and found.of == of:
            return False
        measured = Measurement(of=of, **self._measured(capability, folder))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, measured.model_dump_json() + "\n")
        return True

    def _identity(self, capability: str, folder: Path) -> dict[str, Any]:
        from copd_megatron.fingerprint import fingerprint

        study, config = self._study, self._config
        settings = {
            "capabilities": [capability, study.teacher.capability, study.student.capability],
            "overlaps": study.overlaps,
            "problems": study.problems,
            "top_k": config.opd.top_k,
            "branches": [branch.data.model_dump(mode="json") for branch in config.branches],
            "data": config.data.model_dump(mode="json", exclude={"reward_workers"}),
            "sampling": config.rollout.model_dump(
                mode="json", include={"temperature", "max_new_tokens", "top_p", "top_k"}
            ),
            "eval": [config.eval.problems, config.eval.samples],
            "seed": self._seed,
        }
        models = {name: fingerprint(path) for name, path in {"model": folder, **self._folders}.items()}
        return json.loads(json.dumps({**models, **settings}))

    def _measured(self, capability: str, folder: Path) -> dict[str, Any]:
        from copd_megatron.pilot.distances import seen_by_student, seen_by_teacher

        overlaps, own = self._study.overlaps, self._asking(capability)
        model = self._open("model", folder)
        from_base = seen_by_student(model, self._base, overlaps, own) | seen_by_teacher(model, self._base, own)
        if capability != self._study.student.capability:
            return {"from_base": from_base}
        there = self._asking(self._study.teacher.capability)
        return {
            "from_base": from_base,
            "from_teacher": {
                **seen_by_student(model, self._teacher, overlaps, there),
                **seen_by_teacher(model, self._teacher, there),
                "kl_base": seen_by_teacher(model, self._base, there)["kl"],
            },
            "test": self._tested(folder),
        }

    @cached_property
    def _base(self) -> EmbeddedEngine:
        return self._open("base", self._folders["base"])

    @cached_property
    def _teacher(self) -> EmbeddedEngine:
        return self._open("teacher", self._folders["teacher"])

    def _open(self, name: str, folder: Path) -> EmbeddedEngine:
        from copd_megatron.rollout.embedded import EmbeddedEngine

        return EmbeddedEngine(name, folder, max_rows=self._config.rollout.max_rows)

    def _asking(self, capability: str) -> Asking:
        from copd_megatron.data.capability import first, open_capability
        from copd_megatron.data.prompts import PromptBuilder, load_processor, stop_token_ids
        from copd_megatron.pilot.distances import Asking
        from copd_megatron.rollout.types import Sampling

        config = self._config
        source = open_capability(config.branch(capability), config.data, self._seed, config.eval.problems).validation
        builder = PromptBuilder(load_processor(config.base), config.data.max_prompt_tokens)
        prompts, refused = builder.build_many(first(source, self._study.problems), capability)
        if not prompts:
            reasons = "; ".join(f"{uid}: {reason}" for uid, reason in refused[:3])
            raise DataError(f"branch {capability}: no validation problem can be used ({reasons})")
        sampling = Sampling(
            max_new_tokens=config.rollout.max_new_tokens,
            stop_token_ids=stop_token_ids(config.base, builder.tokenizer),
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
        )
        return Asking(prompts, sampling, seed_for(self._seed, "pilot", capability), config.opd.top_k)

    def _tested(self, folder: Path) -> Pairs:
        from copd_megatron.evaluate.final import eval_settings
        from copd_megatron.evaluate.model import evaluate_model
        from copd_megatron.evaluate.suites import run_suites
        from copd_megatron.rewards.pool import RewardPool

        config, teaches = self._config, self._study.teacher.capability
        suites = [one for one in run_suites(config, self._seed, config.eval.problems) if one.capability == teaches]
        if not suites:
            raise DataError(f"branch {teaches} has no test data, on which gains are measured; set its data.test")
        if len(suites) > 1:
            raise DataError(f"branch {teaches} has several benchmarks; gains are measured on one: set its data.test")
        settings = eval_settings(config, config.eval.samples, self._seed)
        with RewardPool(config.data.reward_workers, config.data.reward_seconds) as pool:
            result = evaluate_model("student", folder, suites, settings, pool)
        return result.benchmarks[0].outcomes
