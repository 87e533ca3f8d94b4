"""Run descriptions for clusters."""

from __future__ import annotations

from typing import Any

from copd_megatron.config import RunConfig


def description(cluster: dict[str, Any], worlds: dict[str, int] | None = None, **changes: Any) -> dict[str, Any]:
    """Two branches of the mini suite on Slurm, as plain data; `worlds` are their numbers of processes."""
    return {
        "base": "models/base",
        "branches": [
            {
                "name": name,
                "data": {"mini": {"modality": name}},
                "parallel": {"world": (worlds or {}).get(name, 1), "pp": (worlds or {}).get(name, 1)},
            }
            for name in ("text", "image")
        ],
        "cluster": {"launcher": "slurm", **cluster},
        **changes,
    }


def described(cluster: dict[str, Any], worlds: dict[str, int] | None = None, **changes: Any) -> RunConfig:
    """The same, checked."""
    return RunConfig.model_validate(description(cluster, worlds, **changes))
