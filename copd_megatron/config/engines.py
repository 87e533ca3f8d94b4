"""Sampling, and the engines that do it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from copd_megatron.config.section import Section
from copd_megatron.errors import ConfigError

KEY_VARIABLE = "COPD_SGLANG_API_KEY"
"""Environment variable with the API key of external servers."""
RUN_VARIABLE = "COPD_RUN_DIR"
"""Environment variable with the folder of the run that a server belongs to."""

BASE = "base"
"""Stands among the branches for the servers that keep the base's weights."""

RESERVED = ("api-key", "dtype", "host", "model-path", "port", "tp-size", "trust-remote-code")
"""Server arguments that other settings decide, or that nobody should."""


def frozen_group(branch: str) -> str:
    """What the servers are called that keep the weights which `branch` had when Phase II began."""
    return f"{branch}/frozen"


class SGLangConfig(Section):
    """Servers of the engine `sglang`: started with the run, or already there."""

    servers: int = Field(1, ge=1)
    """Servers that the run starts for each branch, for the base, and with teacher.refresh = phase for each teacher."""
    urls: dict[str, tuple[str, ...]] = Field({})
    """Servers that are already there, by branch, those of the base as `base`, and with teacher.refresh = phase the
    teachers' as `<branch>/frozen`, e.g. {text: ["http://10.0.0.1:30000"], image: […], base: […]}. Empty: the run
    starts its own."""
    api_key_file: str | None = None
    """File with the external servers' API key; without it the environment variable COPD_SGLANG_API_KEY counts. The
    run's own servers get a new key each time."""
    host: str = "127.0.0.1"
    """Address that the run's own servers listen on: this machine's alone, or its private one."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one server."""
    args: dict[str, str | int | float | bool] = Field({})
    """Further arguments of `sglang.launch_server`, without the dashes: {mem-fraction-static: 0.8}."""
    in_flight: int = Field(128, ge=1)
    """Requests to one server at a time."""
    attempts: int = Field(4, ge=1)
    """How often a request is sent before the run gives up on it."""
    request_seconds: float = Field(1800.0, gt=0)
    """Longest wait for one answer."""
    hang_seconds: float = Field(60.0, gt=0)
    """A server that owes answers, has given none for so long and then none to a question after its health in the same
    time either, has hung: it is lost, and started again if it is one of the run's own."""
    start_seconds: float = Field(600.0, gt=0)
    """Longest wait for a server to start, or to be there again."""
    max_restarts: int = Field(3, ge=0)
    """How often one of the run's own servers is started again before the run stops."""
    sleep: bool = False
    """Have servers give back their GPU memory while the policy trains on the same GPUs (needs
    args: {enable-memory-saver: true}); on a CPU they have nothing to give back."""
    transport: Literal["shared_memory", "broadcast", "files"] = "shared_memory"
    """Way of the weights to the servers: `shared_memory` where they run on the host of their branch's rank 0,
    `broadcast` (NCCL, gloo) anywhere, `files` where they only share the run directory's file system."""
    address: str | None = None
    """For `broadcast`: address at which servers reach rank 0; default `host`."""
    bucket_mib: int = Field(256, ge=1)
    """Weights handed over at a time (MiB)."""

    @model_validator(mode="after")
    def _sound(self) -> SGLangConfig:
        for name in self.args:
            if name.replace("_", "-") in RESERVED or name != name.strip("-"):
                raise ValueError(f"args.{name}: not to be given here; reserved are {', '.join(RESERVED)}")
        for branch, urls in self.urls.items():
            for url in urls:
                if not url.startswith(("http://", "https://")) or url.endswith("/"):
                    raise ValueError(f"urls.{branch}: {url!r} must look like http://10.0.0.1:30000")
        if self.host in ("0.0.0.0", "::"):
            raise ValueError(f"host: {self.host} lets anybody in; give this machine's private address")
        return self

    def api_key(self) -> str | None:
        """The key of external servers. Raises ConfigError if its file cannot be read."""
        if self.api_key_file is None:
            return os.environ.get(KEY_VARIABLE)
        try:
            return Path(self.api_key_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"rollout.sglang.api_key_file: {error}") from error


class RolloutConfig(Section):
    """Sampling."""

    engine: Literal["embedded", "sglang"] = "embedded"
    """`embedded`: transformers' model in the branch's own process; `sglang`: servers (docs/sglang.md)."""
    max_new_tokens: int = Field(16_384, ge=1)
    """Longest response; longer ones are cut and counted."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; student and teacher are compared at the same one."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling; log-probabilities stay those of the full vocabulary."""
    top_k: int = Field(0, ge=0)
    """Sample among the k likeliest only; 0 is off."""
    max_rows: int = Field(512, ge=1)
    """Sequences generated at once; bounds the embedded engine's memory."""
    sglang: SGLangConfig = SGLangConfig()
    """Servers of the engine `sglang`."""

    @model_validator(mode="after")
    def _temperature(self) -> RolloutConfig:
        if self.engine == "sglang" and self.temperature != 1.0:
            raise ValueError(
                f"temperature = {self.temperature}: SGLang scores given tokens at 1.0 only, and student and teacher "
                "must be compared at the temperature of the rollouts; set it to 1.0, or use the embedded engine"
            )
        return self
