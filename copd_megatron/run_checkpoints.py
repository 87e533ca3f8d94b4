"""Checkpoints of a whole run: all branches at the same step, or nothing. Needs no torch.

    run_dir/checkpoints/step_0000015.json                     written last: from here on the checkpoint counts
    run_dir/branches/<branch>/checkpoints/step_0000015/       each branch's part

The run's manifest names every branch's manifest by checksum, and through it every file. A branch's part without it is
the remains of an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from copd_megatron.config import RunConfig
from copd_megatron.config.load import check
from copd_megatron.errors import WeightsError
from copd_megatron.files import checksum, sync_folder, write_atomic
from copd_megatron.fingerprint import fingerprint
from copd_megatron.policy.manifest import (
    FORMAT,
    MANIFEST,
    format_problem,
    problem,
    read_manifest,
    remove,
    step_folder,
    step_of,
)
from copd_megatron.run_folder import RunFolder, mathematical_changes

TEACHER_FILES = "version_*.safetensors"
"""A branch's frozen weights that its students still learn from (`teacher.refresh: phase`), as in `snapshots/`."""


class RunCheckpoints:
    """The checkpoints of the run in `folder`, whose branches are `branches`."""

    def __init__(self, folder: RunFolder, branches: Sequence[str]) -> None:
        self._folder = folder
        self._branches = list(branches)
        self._root = folder.path / "checkpoints"

    def steps(self) -> list[int]:
        """Steps of all checkpoints that count, ascending; whether they are intact is the question of `problem`."""
        return sorted(step for file in self._root.glob("step_*.json") if (step := step_of(file)) is not None)

    def newest(self) -> int:
        """The step that the run would go on from; 0, the base, without a checkpoint."""
        return max(self.steps(), default=0)

    def part(self, branch: str, step: int) -> Path:
        """The folder of a branch's part."""
        return step_folder(self._folder.checkpoints(branch), step)

    def entry(self, branch: str, step: int) -> dict[str, Any]:
        """What the run's manifest says about a branch's complete part."""
        folder = self.part(branch, step)
        files = read_manifest(folder)
        if files is None:
            raise WeightsError(f"{folder}: {problem(folder)}")
        size = sum(entry["bytes"] for entry in files.values())
        return {"manifest": checksum(folder / MANIFEST), "bytes": size, "files": len(files)}

    # ------------------------------------------------------------------ writing

    def commit(self, step: int, content: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the checkpoint of `step` count. Only when every branch's part is on disk; raises OSError."""
        self._root.mkdir(exist_ok=True)
        body = {"format": FORMAT, "step": step, **content, "branches": dict(parts)}
        write_atomic(self._file(step), json.dumps({**body, "sha256": _own_checksum(body)}, indent=1))
        sync_folder(self._root.parent)

    def prune(self, keep: int, keeps: Callable[[int], bool]) -> None:
        """Let all but the newest `keep` checkpoints, and those of steps that `keeps` keeps, count no longer."""
        steps = self.steps()
        for step in steps[:-keep]:
            if not keeps(step):
                self._file(step).unlink()

    def clear(self, branch: str, before: int | None = None) -> None:
        """Remove what a branch holds of checkpoints that do not count; only below the step `before` where given."""
        kept = set(self.steps())
        for folder in self._folder.checkpoints(branch).glob("*step_*"):
            step = step_of(folder)
            if before is not None and (step is None or step >= before):
                continue
            if step not in kept:
                remove(folder)

    def forget_after(self, step: int) -> None:
        """Let later checkpoints than that of `step` count no longer: the run takes another way from there."""
        for later in self.steps():
            if later > step:
                self._file(later).unlink()

    def restore_teachers(self, step: int) -> None:
        """Put the frozen teachers' weights back where students look for them. Raises WeightsError if damaged."""
        for branch in self._branches if step else ():
            part = self.part(branch, step)
            files = read_manifest(part) or {}
            for file in part.glob(TEACHER_FILES):
                if checksum(file) != files[file.name]["sha256"]:
                    raise WeightsError(f"{file}: differs from its checksum in {MANIFEST}: damaged. {self.advice(step)}")
                target = self._folder.snapshots / branch / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target.with_suffix(".tmp"))
                os.replace(target.with_suffix(".tmp"), target)

    # ------------------------------------------------------------------ reading

    def problem(self, step: int, config: RunConfig | None = None, contents: bool = False) -> str | None:
        """Why the run cannot go on from `step`, None if it can.

        `config` is the configuration that wants to go on: it must train the same way, from the same base. Checksums of
        large files are compared only with `contents`; `checkpoint.load` compares them in any case.
        """
        try:
            body: dict[str, Any] = json.loads(self._file(step).read_text())
            if wrong := format_problem(body):
                return wrong
            stated = body.pop("sha256")
            if stated != _own_checksum(body) or body["step"] != step:
                return f"{self._file(step)} differs from its own checksum: damaged"
        except FileNotFoundError:
            return f"there is no {self._file(step)}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{self._file(step)} cannot be read ({error}): damaged"
        if set(body["branches"]) != set(self._branches):
            return f"it holds branches {sorted(body['branches'])}, this run has {sorted(self._branches)}"
        if config is not None and (changed := _changes(body, config)):
            return changed
        for branch in self._branches:
            part = self.part(branch, step)
            if wrong := problem(part, contents):
                return f"{part}: {wrong}"
            if checksum(part / MANIFEST) != body["branches"][branch]["manifest"]:
                return f"{part}: {MANIFEST} is not the one that {self._file(step)} names"
        return None

    def require(self, step: int, config: RunConfig) -> None:
        """Raise WeightsError, naming the reason and the newest usable checkpoint, unless the run can go on from
        `step`."""
        if wrong := self.problem(step, config):
            raise WeightsError(
                f"{self._folder.path}: the checkpoint of step {step} cannot be used: {wrong}. "
                f"{self.advice(step, config)}"
            )

    def advice(self, unusable: int, config: RunConfig | None = None) -> str:
        """Where the run can go on, if not from the step `unusable`. Reads the candidates whole."""
        for step in sorted(set(self.steps()) - {unusable}, reverse=True):
            if self.problem(step, config, contents=True) is None:
                return (
                    f"The newest usable checkpoint is that of step {step}: add --resume-from {step} to go on from it "
                    "(what came after it is forgotten)"
                )
        return "No other checkpoint of this run is usable: add --resume-from 0 to start again from the base"

    def _file(self, step: int) -> Path:
        return step_folder(self._root, step).with_suffix(".json")


def description(config: RunConfig, base: str) -> dict[str, Any]:
    """What a run's manifest says about the run itself; `base` is the base's fingerprint."""
    return {
        "config": config.model_dump(mode="json"),
        "base": base,
        "experts": {name: fingerprint(folder) for name, folder in sorted(config.experts.items())},
        "topology": [list(edge) for edge in config.edges],
    }


def _changes(body: Mapping[str, Any], config: RunConfig) -> str | None:
    saved = check(body["config"], RunConfig, "the checkpoint's configuration")  # later keys get their defaults
    if changed := mathematical_changes(saved.model_dump(mode="json"), config.model_dump(mode="json")):
        return "it was trained with another configuration (its value -> the one given): " + "; ".join(changed)
    if (found := fingerprint(config.base)) != body["base"]:
        return (
            f"it was trained from another base: {config.base} has fingerprint {found[:12]}…, expected "
            f"{body['base'][:12]}… (configuration, tokenizer or weights have changed)"
        )
    for name, folder in config.experts.items():
        if (found := fingerprint(folder)) != body["experts"][name]:
            return f"the expert {name!r} was another one: {folder} has changed (fingerprint now {found[:12]}…)"
    return None


def _own_checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
