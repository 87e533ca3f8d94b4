"""Whole runs of the real command on an untrained mini model: seconds each, every part real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import yaml

from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder

TINY = {
    "branches": [
        {"name": "text", "data": {"mini": {"modality": "text"}}},
        {"name": "image", "data": {"mini": {"modality": "image"}}},
    ],
    "rhythm": {"cycles": 1, "explore_steps": 3, "exchange_steps": 3},
    "rl": {"prompts": 4, "group": 4},
    "opd": {"loss": "topk_forward", "native_prompts": 2, "cross_prompts": 2},
    "optimizer": {"lr": 1e-3},
    "precision": {"params": "fp32", "max_tokens_per_microbatch": 2048},
    "rollout": {"max_new_tokens": 6},
    "data": {"max_prompt_tokens": 256},
    "log": {"overlap_k": 5, "probe_every": 2, "probe_prompts": 4, "tensorboard": False},
    "checkpoint": {"every_steps": 1},
    "eval": {"problems": 8},
}


class Command:
    """`copd train` of the tiny configuration in a run directory of its own."""

    def __init__(self, folder: Path, base: Path, **changes) -> None:
        self.run = folder / "run"
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({**TINY, "base": str(base), "run_dir": str(self.run), **changes}))

    def start(self, *options: str, within: Sequence[str] = ()) -> subprocess.Popen[str]:
        """The command in the background, in a process group of its own; `within` is a command that starts another."""
        return subprocess.Popen(
            [*within, sys.executable, "-m", "copd_megatron.cli", "train", str(self.config), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        )

    def finish(self, process: subprocess.Popen[str] | None = None, timeout: float = 240) -> tuple[int, str]:
        """Exit status and output."""
        process = process or self.start()
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, output

    def lines(self, branch: str) -> list[dict]:
        """A branch's metrics so far."""
        file = self.run / "branches" / branch / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]

    def wait_for(self, process: subprocess.Popen[str], branch: str, reached: Callable[[list[dict]], bool]) -> None:
        """Until a branch's metrics satisfy `reached`."""
        deadline = time.monotonic() + 300
        while not reached(self.lines(branch)):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, "the run made no progress"
            time.sleep(0.02)

    def rank(self, branch: str) -> psutil.Process:
        """The process of a branch's rank 0."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "copd_megatron.worker" in words and str(self.run) in words and branch in words:
                return process
        raise AssertionError(f"no rank of branch {branch} is running")

    def weights(self) -> dict[str, bytes]:
        """The bytes of every model that the run ends with."""
        files = sorted(self.run.glob("**/model.safetensors"))
        return {str(file.relative_to(self.run)): file.read_bytes() for file in files}

    def checkpoints(self) -> RunCheckpoints:
        """The run's checkpoints."""
        return RunCheckpoints(RunFolder(self.run), ["text", "image"])


def comparable(lines: list[dict]) -> list[dict]:
    """Metrics without clocks and memory."""
    timed = ("time", "tokens_per_second", "rss_gib", "memory_gib", "gpu")
    return [{key: value for key, value in line.items() if key.split("/")[0] not in timed} for line in lines]
