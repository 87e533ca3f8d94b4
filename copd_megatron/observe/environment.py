"""Which software and hardware made a run. Written by the run itself: a report is often made elsewhere."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from copd_megatron import __version__
from copd_megatron.errors import CopdError
from copd_megatron.files import write_atomic
from copd_megatron.observe.gpu import GpuTelemetry

ENVIRONMENT_FILE = "environment.json"
PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "triton",
    "sglang",
    "safetensors",
    "datasets",
    "numpy",
)


def record_environment(run_dir: str | os.PathLike[str]) -> None:
    """Add this process's environment to the run, unless it is that of the last entry: a run may be resumed by another.

    Call at the start and at every resume, from one process.
    """
    entries = read_environments(run_dir)
    present = _environment()
    if not entries or entries[-1]["packages"] != present["packages"] or entries[-1]["machine"] != present["machine"]:
        content = json.dumps([*entries, present], indent=2) + "\n"
        write_atomic(Path(run_dir) / ENVIRONMENT_FILE, content)


def read_environments(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The environments a run has lived in, oldest first; empty where none was recorded.

    Each has `time` (seconds since 1970), `packages` {name: version} and `machine` {property: text}.
    """
    path = Path(run_dir) / ENVIRONMENT_FILE
    try:
        entries = json.loads(path.read_bytes())
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CopdError(f"{path}: expected JSON, found something else ({error}); remove the file") from error
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("packages"), dict) and isinstance(entry.get("machine"), dict)
        for entry in entries
    ):
        raise CopdError(f"{path}: expected a list of objects with `packages` and `machine`; remove the file")
    return entries


def _environment() -> dict[str, Any]:
    packages = {"copd-megatron": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    telemetry = GpuTelemetry()
    gpus = telemetry.names()
    telemetry.close()
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "gpus": ", ".join(f"{gpus.count(name)} × {name}" for name in sorted(set(gpus))) or "none",
    }
    return {"time": round(time.time(), 3), "packages": packages, "machine": machine}
