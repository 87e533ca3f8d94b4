"""Which checkpoint folders are complete. Needs no torch, so that the conductor can ask at once.

root/step_0000015/manifest.json     {"format": 1, "files": {name: {"bytes": …, "sha256": …}}}, written last
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copd_megatron.files import checksum, write_atomic

MANIFEST = "manifest.json"
FORMAT = 1
"""Goes up when a version writes what an older one cannot read."""

Files = dict[str, dict[str, Any]]
"""File name to {"bytes": size, "sha256": hexadecimal}."""


def step_folder(root: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint after `step` updates belongs."""
    return Path(root) / f"step_{step:07d}"


def step_of(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder or file; None for any other name."""
    number = path.name.removesuffix(".json").removeprefix("step_")
    return int(number) if path.name.startswith("step_") and number.isdecimal() else None


def describe(file: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": file.stat().st_size, "sha256": checksum(file)}


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Declare `folder` complete: it holds `files` and nothing else that counts."""
    write_atomic(folder / MANIFEST, json.dumps({"format": FORMAT, "files": dict(sorted(files.items()))}, indent=1))


def read_manifest(folder: Path) -> Files | None:
    """The files of a complete checkpoint, None unless every one is there in its size. Contents are not read."""
    return None if problem(folder) else _read(folder)["files"]


def problem(folder: Path, contents: bool = False) -> str | None:
    """Why the checkpoint in `folder` cannot be read, None if it can. Checksums are compared only with `contents`."""
    try:
        content = _read(folder)
        unreadable = format_problem(content)
        if unreadable:
            return unreadable
        for name, entry in content["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (size := (folder / name).stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes, {MANIFEST} says {entry['bytes']}"
            if contents and checksum(folder / name) != entry["sha256"]:
                return f"{name} differs from its checksum in {MANIFEST}"
    except FileNotFoundError:
        return f"there is no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def format_problem(content: Mapping[str, Any]) -> str | None:
    """Why this version cannot read what has this manifest, None if it can."""
    found = content.get("format")
    if not isinstance(found, int):
        return "its manifest has no format number: it is damaged, or from a version before format 1"
    if found > FORMAT:
        return f"it has format {found}, this version reads up to {FORMAT}; use a newer copd-megatron"
    return None


def valid_steps(root: str | os.PathLike[str]) -> list[int]:
    """Steps with a complete checkpoint under `root`, ascending; sizes are checked, checksums are left to `load`."""
    steps = ((step_of(folder), folder) for folder in Path(root).glob("step_*"))
    return sorted(step for step, folder in steps if step is not None and problem(folder) is None)


def newest_valid(root: str | os.PathLike[str]) -> int | None:
    """The last step with a complete checkpoint under `root`; None if there is none."""
    return max(valid_steps(root), default=None)


def remove(folder: Path) -> None:
    """Remove a checkpoint's folder. It is renamed first: what an interruption leaves must not look like one."""
    doomed = folder.with_name(f".{folder.name.strip('.')}.tmp") if not folder.name.startswith(".") else folder
    if doomed != folder:
        shutil.rmtree(doomed, ignore_errors=True)
        folder.replace(doomed)
    shutil.rmtree(doomed)


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content
