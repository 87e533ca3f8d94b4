"""The description of a pilot study: one teacher, students at several distances from it, the same short distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from copd_megatron.compare.settings import filled, merged
from copd_megatron.config.load import check
from copd_megatron.config.run import RunConfig
from copd_megatron.config.section import Section
from copd_megatron.run_folder import RunFolder

OURS = ("seed", "run_dir", "method", "student", "experts", "topology", "rhythm")
"""Keys of a run description that follow from the study."""


class TeacherSettings(Section):
    """The one teacher."""

    capability: str
    """The branch that it is an expert of."""
    updates: int = Field(ge=1)
    """Its updates of reinforcement learning on that capability."""


class StudentSettings(Section):
    """The students: one model at several points of its own reinforcement learning."""

    capability: str
    """The branch that they are experts of."""
    updates: tuple[int, ...] = Field(min_length=1)
    """A student for each of these numbers of updates, ascending; 0 is the base."""


class PilotSettings(Section):
    """A pilot study. Its runs are in <out>/runs, its results <out>/pilot.{json,md,html}."""

    out: str
    """Folder of everything."""
    teacher: TeacherSettings
    """Who teaches."""
    student: StudentSettings
    """Who learns."""
    budget: int = Field(ge=1)
    """Updates of distillation that each student gets."""
    common: dict[str, Any]
    """A run description without what the study decides itself; `{seed}` in a text stands for the seed."""
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    """Seeds; each is a repetition of everything, base included."""
    overlaps: tuple[int, ...] = Field((1, 5, 10), min_length=1)
    """k of each overlap@k that is measured; `common.log.overlap_k` says which one gain is drawn against."""
    problems: int = Field(256, ge=2)
    """Validation problems per capability on which distances are measured. Gains are measured on the test problems."""
    least_advantage: float = Field(0.02, gt=0)
    """How far (a share of the test problems) the teacher must be ahead of a student for the share absorbed to mean
    anything."""
    replicates: int = Field(2000, ge=100)
    """Bootstrap replicates."""

    @model_validator(mode="after")
    def _consistent(self) -> PilotSettings:
        updates = list(self.student.updates)
        if updates != sorted(set(updates)) or updates[0] < 0:
            raise ValueError(f"student.updates = {updates}: expected different numbers from 0 up, ascending")
        if updates[-1] == 0:
            raise ValueError("student.updates = [0]: at least one student must have been trained; add its updates")
        if self.teacher.capability == self.student.capability:
            raise ValueError(
                f"student.capability = {self.student.capability!r} is the teacher's own; expected another branch"
            )
        if given := [key for key in OURS if key in self.common]:
            raise ValueError(f"common.{given[0]}: the study decides it; leave out {', '.join(given)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must differ, found {list(self.seeds)}")
        if len(set(self.overlaps)) != len(self.overlaps) or min(self.overlaps) < 1:
            raise ValueError(f"overlaps = {list(self.overlaps)}: expected different numbers of at least 1")
        config = check(filled({**self.common, "method": "merge_only"}, self.seeds[0]), RunConfig, "common")
        names = [branch.name for branch in config.branches]
        for field, name in (("teacher", self.teacher.capability), ("student", self.student.capability)):
            if name not in names:
                raise ValueError(f"{field}.capability = {name!r} is none of the branches {', '.join(names)}")
        if "branches" not in config.eval.models:
            raise ValueError(f"common.eval.models = {list(config.eval.models)}: gains need branches among them")
        if (main := config.log.overlap_k) not in self.overlaps:
            raise ValueError(f"common.log.overlap_k = {main} is none of overlaps = {list(self.overlaps)}; add it")
        if config.opd.top_k < max(self.overlaps):
            raise ValueError(f"common.opd.top_k = {config.opd.top_k}: overlaps need at least {max(self.overlaps)}")
        return self

    def rlvr(self, seed: int, capability: str) -> RunConfig:
        """The independent reinforcement learning on a capability. Raises ConfigError if it is no valid description."""
        own = self.student if capability == self.student.capability else self.teacher
        updates = own.updates if isinstance(own, StudentSettings) else (own.updates,)
        changes = {
            "method": "expert",
            "student": capability,
            "rhythm": {"cycles": 1, "explore_steps": updates[-1], "exchange_steps": 0},
            "checkpoint": {"at_steps": self.curve(capability)},
        }
        return self._run(f"rlvr_{capability}", seed, changes)

    def curve(self, capability: str) -> list[int]:
        """Updates after which the reinforcement learning on a capability is looked at: the students' own, as far as it
        goes, and its last."""
        if capability == self.student.capability:
            return [step for step in self.student.updates if step]
        own = self.teacher.updates
        return [*(step for step in self.student.updates if 0 < step < own), own]

    def measured(self, capability: str) -> list[int]:
        """Updates after which a model's distances are measured, the base's among them."""
        return [0, *self.curve(capability)]

    def distillation(self, seed: int, updates: int) -> RunConfig:
        """What the student of so many updates learns from the teacher."""
        teacher, student = self.teacher.capability, self.student.capability
        changes = {
            "method": "static_opd",
            "student": student,
            "topology": [{"student": student, "teacher": teacher}],
            "experts": {
                student: str(self.model(seed, student, updates)),
                teacher: str(self.model(seed, teacher, self.teacher.updates)),
            },
            "rhythm": {"cycles": 1, "explore_steps": 0, "exchange_steps": self.budget},
            "eval": {"models": ["branches"]},
        }
        return self._run(f"opd_{updates}", seed, changes)

    def model(self, seed: int, capability: str, updates: int) -> Path:
        """Hugging Face folder of the model after so many updates of reinforcement learning on a capability."""
        config = self.rlvr(seed, capability)
        if updates == 0:
            return Path(config.base)
        if updates == config.rhythm.explore_steps:
            return RunFolder(config.run_dir).final(capability)
        return Path(config.run_dir) / "models" / f"step_{updates:07d}"

    def measurement(self, seed: int, capability: str, updates: int) -> Path:
        """Where the distances of that model are written."""
        return Path(self.out) / "measured" / f"{capability}_{updates}_seed{seed}.json"

    def _run(self, name: str, seed: int, changes: dict[str, Any]) -> RunConfig:
        content = merged(self.common, {"seed": seed, "run_dir": f"{self.out}/runs/{name}_seed{seed}", **changes})
        return check(filled(content, seed), RunConfig, f"common, as {name} of seed {seed}")
