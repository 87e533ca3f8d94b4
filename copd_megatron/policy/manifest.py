"""Which checkpoint folders are complete. Needs no torch, so that the conductor can ask at once.

root/step_0000015/manifest.json     lists every file of the checkpoint with size and SHA-256, and is written last
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def step_folder(root: str | os.PathLike[str], step: int) -> Path:
    """Where the checkpoint after `step` updates belongs."""
    return Path(root) / f"step_{step:07d}"


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File name to {"bytes", "sha256"}, or None unless every file is there in its size. Contents are not read."""
    try:
        files: dict[str, dict[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        complete = all((folder / name).stat().st_size == entry["bytes"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return files if complete else None


def valid_steps(root: str | os.PathLike[str]) -> list[int]:
    """Steps with a complete checkpoint under `root`, ascending; sizes are checked, checksums are left to `load`."""
    steps = []
    for folder in Path(root).glob("step_*"):
        number = folder.name.removeprefix("step_")
        if number.isdecimal() and read_manifest(folder) is not None:
            steps.append(int(number))
    return sorted(steps)


def newest_valid(root: str | os.PathLike[str]) -> int | None:
    """The last step with a complete checkpoint under `root`; None if there is none."""
    return max(valid_steps(root), default=None)
