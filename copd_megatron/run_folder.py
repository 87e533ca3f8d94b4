"""The layout of a run directory, and the rule that a directory belongs to one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from copd_megatron.config import RunConfig, save_config
from copd_megatron.config.load import check, differences
from copd_megatron.errors import ConfigError

FREE = (
    "run_dir",
    "log",
    "checkpoint",
    "cluster",
    "data.reward_workers",
    "precision.max_tokens_per_microbatch",
    "rollout.engine",
    "rollout.max_rows",
    "rollout.sglang",
    "supervision",
    "teacher.where",
    "teacher.wait_seconds",
)
"""What a continued run may change, beside its branches' `parallel`: where and how it computes, not what."""
STEERING = ("log.overlap_k", "log.probe_every", "log.probe_prompts")
"""What decides when the phases of a steered rhythm end, and so may not change with one."""


class RunFolder:
    """Names of everything below `run_dir`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.branches = self.path / "branches"
        self.snapshots = self.path / "snapshots"
        self.merged = self.path / "merged"
        self.evaluation = self.path / "evaluation.json"
        self.outcomes = self.path / "outcomes.json"
        self.summary = self.path / "summary.json"
        self.log = self.path / "run.log"
        self.endpoints = self.path / "endpoints.json"
        self.slurm = self.path / "slurm"
        self.status = self.path / "status.json"

    def branch(self, name: str) -> Path:
        """Everything one branch writes."""
        return self.branches / name

    def checkpoints(self, name: str) -> Path:
        """A branch's checkpoints, one folder per step."""
        return self.branch(name) / "checkpoints"

    def final(self, name: str) -> Path:
        """A branch's finished model, a Hugging Face folder."""
        return self.branch(name) / "final"

    def open(self, config: RunConfig) -> list[str]:
        """Create the folder, or make sure that it belongs to `config`; the changes that a continued run may have.

        Raises ConfigError with the differences that would change what is trained.
        """
        if not self.config_file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run_dir")
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, self.config_file)
            return []
        old, new = self.config().model_dump(mode="json"), config.model_dump(mode="json")
        if changed := mathematical_changes(old, new):
            raise ConfigError(
                f"{self.path} holds a run of another configuration (its value -> the one given):\n  "
                + "\n  ".join(changed)
                + "\nGive another run_dir, or the old values to continue that run."
            )
        return [line for line in differences(_by_name(old), _by_name(new)) if not line.startswith("run_dir:")]

    def adopt(self, config: RunConfig) -> None:
        """From now on this is the configuration that the run's processes read; `open` has found it to fit."""
        save_config(config, self.config_file)

    def config(self) -> RunConfig:
        """The configuration that the run was last started with."""
        return check(yaml.safe_load(self.config_file.read_text()), RunConfig, str(self.config_file))


def mathematical_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `key: old -> new` for whatever two resolved configurations would train differently."""
    lines = differences(_by_name(old), _by_name(new))
    bound = () if old["rhythm"]["kind"] == "fixed" else STEERING
    return [line for line in lines if line.split(":", 1)[0] in bound or not _is_free(line.split(":", 1)[0])]


def _is_free(key: str) -> bool:
    if key.startswith("branches."):
        return key.split(".")[2:3] == ["parallel"]
    return any(key == free or key.startswith(f"{free}.") for free in FREE)


def _by_name(config: dict[str, Any]) -> dict[str, Any]:
    """Branches as a mapping, so that their differences are named; their order counts (topology, merge)."""
    branches = config["branches"]
    return {
        **config,
        "branches": {branch["name"]: branch for branch in branches},
        "order of branches": [branch["name"] for branch in branches],
    }
