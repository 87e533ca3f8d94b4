"""What the runs and measurements of a pilot study come to, as in `pilot.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from copd_megatron.compare.child_run import is_done
from copd_megatron.compare.results import read_outcomes
from copd_megatron.compare.statistics import Interval
from copd_megatron.errors import CopdError
from copd_megatron.pilot.analysis import GAIN_TEST, Analysis, Problems, Quantity, Student, analyse, value_of
from copd_megatron.pilot.measure import Measurement, read_measurement
from copd_megatron.pilot.settings import PilotSettings

Key = tuple[int, int]
"""Seed and number of updates."""


@dataclass(frozen=True)
class Accuracies:
    """On the test problems of the teacher's capability, 0 to 1: a student before and after, and its teacher."""

    before: Interval
    after: Interval | None
    teacher: Interval


@dataclass(frozen=True)
class PilotResult:
    """`curves`: by capability and seed, by updates, the distances of independent reinforcement learning from the base.
    `missing` says why a student has no gain."""

    analysis: Analysis
    accuracies: Mapping[Key, Accuracies]
    curves: Mapping[tuple[str, int], Mapping[int, Mapping[str, Interval]]]
    missing: Mapping[Key, str]


def predictors(study: PilotSettings) -> dict[str, str]:
    """What might predict the share absorbed, and what it is called."""
    return {
        **{f"overlap@{k}": f"overlap@{k}" for k in study.overlaps},
        "symkl": "symmetric KL",
        "low_support": "low support",
        "kl_teacher": "KL(teacher ‖ student)",
        "kl_base_own": "KL(base ‖ student), own problems",
        "kl_base": "KL(base ‖ student), teacher's problems",
    }


def gather(study: PilotSettings, reasons: Mapping[Key, str]) -> PilotResult:
    """Everything that is there. Raises CopdError for damaged files, or if nothing is there."""
    students, missing = [], {}
    accuracies: dict[Key, Accuracies] = {}
    curves: dict[tuple[str, int], dict[int, dict[str, Interval]]] = {}
    for seed in study.seeds:
        for capability in (study.teacher.capability, study.student.capability):
            for updates in study.measured(capability):
                found = read_measurement(study.measurement(seed, capability, updates))
                if found is not None:
                    curves.setdefault((capability, seed), {})[updates] = {
                        name: value_of(Quantity("own validation", pairs), seed, study.replicates)
                        for name, pairs in found.from_base.items()
                    }
        for updates in study.student.updates:
            student = _student(study, seed, updates)
            if student is not None:
                students.append(student)
                accuracies[seed, updates] = _accuracies(student, study.replicates)
            if student is None or student.after is None:
                missing[seed, updates] = reasons.get((seed, updates), "not run")
    if not students:
        why = "; ".join(dict.fromkeys(reasons.values())) or "nothing was run"
        raise CopdError(f"{study.out}: no student has been measured ({why}); the logs are in {study.out}/runs")
    return PilotResult(analyse(students, study.least_advantage, study.replicates), accuracies, curves, missing)


def as_plain(study: PilotSettings, result: PilotResult) -> dict[str, Any]:
    """For `pilot.json`."""
    main = f"overlap@{study.rlvr(study.seeds[0], study.student.capability).log.overlap_k}"
    keys = [(seed, updates) for seed in study.seeds for updates in study.student.updates]
    return {
        "study": study.model_dump(mode="json"),
        "main": main,
        "students": [
            {
                "seed": key[0],
                "updates": key[1],
                "missing": result.missing.get(key),
                "absorbed": _plain(result.analysis.gains.get(key)),
                "accuracy": _plain(result.accuracies.get(key)),
                "predictors": {name: asdict(value) for name, value in result.analysis.values.get(key, {}).items()},
            }
            for key in keys
        ],
        "relations": {name: asdict(relation) for name, relation in result.analysis.relations.items()},
        "rlvr": [
            {
                "capability": capability,
                "seed": seed,
                "updates": updates,
                **{name: asdict(value) for name, value in values.items()},
            }
            for (capability, seed), curve in result.curves.items()
            for updates, values in curve.items()
        ],
    }


def _plain(value: Interval | Accuracies | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)


def _student(study: PilotSettings, seed: int, updates: int) -> Student | None:
    found = read_measurement(study.measurement(seed, study.student.capability, updates))
    teacher = _tested(study, study.rlvr(seed, study.teacher.capability).run_dir, study.teacher.capability)
    if found is None or teacher is None:
        return None
    after = _tested(study, study.distillation(seed, updates).run_dir, study.student.capability)
    return Student(seed, updates, found.test, after, teacher, _quantities(study, found))


def _tested(study: PilotSettings, run_dir: str, branch: str) -> Problems | None:
    """What a run's branch made of the test problems of the teacher's capability; None if the run is not done."""
    run = Path(run_dir)
    if not is_done(run):
        return None
    try:
        return read_outcomes(run)[f"{branch} branch"][study.teacher.capability]
    except KeyError as error:
        raise CopdError(f"{run}/outcomes.json: expected {branch} branch on {study.teacher.capability}") from error


def _quantities(study: PilotSettings, found: Measurement) -> dict[str, Quantity]:
    there, own = "teacher's validation", "own validation"
    return {
        **{f"overlap@{k}": Quantity(there, found.from_teacher[f"overlap@{k}"]) for k in study.overlaps},
        "symkl": Quantity(there, found.from_teacher["symkl"]),
        "low_support": Quantity(there, found.from_teacher["low_support"]),
        "kl_teacher": Quantity(there, found.from_teacher["kl"]),
        "kl_base_own": Quantity(own, found.from_base["kl"]),
        "kl_base": Quantity(there, found.from_teacher["kl_base"]),
    }


def _accuracies(student: Student, replicates: int) -> Accuracies:
    def accuracy(problems: Problems) -> Interval:
        return value_of(Quantity(GAIN_TEST, problems), student.seed, replicates)

    after = None if student.after is None else accuracy(student.after)
    return Accuracies(accuracy(student.before), after, accuracy(student.teacher))
