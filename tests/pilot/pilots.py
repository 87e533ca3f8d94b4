"""A pilot study whose runs and measurements are made up, written as real ones are."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from copd_megatron.config import RunConfig, load_config, save_config
from copd_megatron.pilot.measure import Measurement
from copd_megatron.pilot.settings import PilotSettings
from copd_megatron.run_folder import RunFolder

DESCRIPTION = {
    "teacher": {"capability": "text", "updates": 20},
    "student": {"capability": "image", "updates": [0, 10, 20, 40]},
    "budget": 5,
    "overlaps": [1, 5],
    "problems": 50,
    "replicates": 200,
    "common": {
        "base": "bases/seed_{seed}",
        "branches": [{"name": name, "data": {"mini": {"modality": name}}} for name in ("text", "image")],
        "log": {"overlap_k": 5},
        "checkpoint": {"keep": 1},
    },
}
GAINS = {0: 0.9, 10: 0.6, 20: 0.5, 40: 0.1}


def describe(folder: Path, **changes) -> Path:
    """The description as a file."""
    file = folder / "pilot.yaml"
    file.write_text(yaml.safe_dump({**DESCRIPTION, "out": str(folder / "out"), **changes}))
    return file


def study(folder: Path, **changes) -> PilotSettings:
    return load_config(describe(folder, **changes), [], PilotSettings)


def solved(share: float, problems: int = 200) -> list[list[float]]:
    return [[float(place < round(share * problems)), 1] for place in range(problems)]


def finish(config: RunConfig, branch: str, share: float) -> None:
    """A run that is done, whose branch solves so many of the test problems of `text`."""
    folder = RunFolder(config.run_dir)
    folder.path.mkdir(parents=True)
    save_config(config, folder.config_file)
    folder.summary.write_text("{}")
    folder.outcomes.write_text(json.dumps({f"{branch} branch": {"text": solved(share), "image": solved(0.5)}}))


def finish_experts(given: PilotSettings, seed: int) -> None:
    finish(given.rlvr(seed, "text"), "text", 0.8)
    finish(given.rlvr(seed, "image"), "image", 0.3)


def measure(given: PilotSettings, seed: int, capability: str, updates: int) -> None:
    """Distances that grow with the updates."""
    draw = random.Random(f"{seed} {capability} {updates}")

    def around(mean: float) -> list[tuple[float, float]]:
        return [(max(0.0, draw.gauss(mean, 0.1)) * 5, 5.0) for _ in range(given.problems)]

    far = updates / 100
    distances = {"overlap@1": around(1 - far), "overlap@5": around(1 - far / 2), "symkl": around(2 * far),
                 "kl": around(far), "low_support": around(far)}  # fmt: skip
    more = {"from_teacher": {**distances, "kl_base": around(far)}, "test": solved(0.4)} if capability == "image" else {}
    file = given.measurement(seed, capability, updates)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(Measurement(of={}, from_base=distances, **more).model_dump_json())


def make_up(given: PilotSettings, seed: int, without: tuple[int, ...] = ()) -> None:
    """A seed in which all but the students `without` were distilled."""
    finish_experts(given, seed)
    for capability in ("text", "image"):
        for updates in given.measured(capability):
            measure(given, seed, capability, updates)
    for updates in given.student.updates:
        if updates not in without:
            finish(given.distillation(seed, updates), "image", 0.4 + 0.4 * GAINS[updates])
