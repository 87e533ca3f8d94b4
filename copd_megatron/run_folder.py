"""The layout of a run directory, and the rule that a directory belongs to one configuration."""

from __future__ import annotations

from pathlib import Path

import yaml

from copd_megatron.config import RunConfig, save_config
from copd_megatron.config.load import check, differences
from copd_megatron.errors import ConfigError
from copd_megatron.policy.manifest import valid_steps


class RunFolder:
    """Names of everything below `run_dir`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.snapshots = self.path / "snapshots"
        self.merged = self.path / "merged"
        self.evaluation = self.path / "evaluation.json"
        self.log = self.path / "run.log"

    def branch(self, name: str) -> Path:
        """Everything one branch writes."""
        return self.path / "branches" / name

    def checkpoints(self, name: str) -> Path:
        """A branch's checkpoints, one folder per step."""
        return self.branch(name) / "checkpoints"

    def final(self, name: str) -> Path:
        """A branch's finished model, a Hugging Face folder."""
        return self.branch(name) / "final"

    def open(self, config: RunConfig) -> None:
        """Create the folder, or make sure that it belongs to `config`. Raises ConfigError with the differences."""
        if not self.config_file.exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise ConfigError(f"{self.path}: not empty and not a run directory; choose another run_dir")
            self.path.mkdir(parents=True, exist_ok=True)
            save_config(config, self.config_file)
            return
        old = self.config().model_dump(mode="json")
        changed = [line for line in differences(old, config.model_dump(mode="json")) if not line.startswith("run_dir:")]
        if changed:
            raise ConfigError(
                f"{self.path} holds a run of another configuration (its value -> the one given):\n  "
                + "\n  ".join(changed)
                + "\nGive another run_dir, or the old values to continue that run."
            )

    def config(self) -> RunConfig:
        """The configuration that the run was started with."""
        return check(yaml.safe_load(self.config_file.read_text()), RunConfig, str(self.config_file))

    def common_step(self, branches: list[str]) -> int:
        """The newest step at which every branch has a valid checkpoint; 0 without one."""
        steps = [set(valid_steps(self.checkpoints(name))) for name in branches]
        return max(set.intersection(*steps), default=0)
