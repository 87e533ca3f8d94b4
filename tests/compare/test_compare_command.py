"""`copd compare` with real runs: stopped, continued, and with one that cannot be done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from copd_megatron.data.mini.model import build

BRANCHES = [{"name": name, "data": {"mini": {"modality": name}}} for name in ("text", "image")]
COMMON = {
    "branches": BRANCHES,
    "rhythm": {"cycles": 1, "explore_steps": 2, "exchange_steps": 1},
    "rl": {"prompts": 4, "group": 4},
    "opd": {"loss": "topk_forward", "cross_prompts": 2},
    "precision": {"params": "fp32", "max_tokens_per_microbatch": 2048},
    "rollout": {"max_new_tokens": 6},
    "data": {"max_prompt_tokens": 256},
    "log": {"overlap_k": 5, "probe_prompts": 4, "tensorboard": False},
    "checkpoint": {"every_steps": 1},
    "eval": {"problems": 8},
}
ARMS = [
    {
        "name": "experts",
        "settings": {"method": "merge_only", "rhythm": {"explore_steps": 30, "exchange_steps": 0}},
        "rows": [{"label": "merge", "model": "merged", "equal_budget": False}],
    },
    {
        "name": "broken",
        "settings": {"data": {"max_prompt_tokens": 3}},
        "rows": [{"label": "impossible", "model": "merged"}],
    },
    {
        "name": "mopd",
        "experts": "experts",
        "settings": {"method": "mopd", "rhythm": {"explore_steps": 0}},
        "rows": [{"label": "MOPD", "model": "mopd branch"}],
    },
]


def start(file: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "copd_megatron.cli", "compare", str(file), "--seeds", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_comparison_goes_on_with_what_is_missing(tmp_path):
    build(tmp_path / "base", seed=0)
    out = tmp_path / "out"
    common = {**COMMON, "base": str(tmp_path / "base")}
    content = {"out": str(out), "reference": "MOPD", "replicates": 100, "common": common, "arms": ARMS}
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(content))

    process = start(file)
    metrics = out / "runs" / "experts_seed1" / "branches" / "text" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count('"explore"') >= 2):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 130, output
    assert "the same command goes on from there" in output
    saved = [path.name for path in (out / "runs/experts_seed1/checkpoints").iterdir()]
    assert saved, "the run was told to save"

    process = start(file)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1, output
    assert "broken, seed 1: error:" in output
    log = (out / "runs/experts_seed1.log").read_text()
    assert "continuing from step" in log
    lines = (out / "compare.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| impossible"))
    assert "not run: error:" in row
    assert any(line.startswith("| MOPD") and "not run" not in line for line in lines)

    file.write_text(yaml.safe_dump({**content, "arms": [ARMS[0], ARMS[2]]}))
    process = start(file)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "training" not in output, "everything was there"
    assert "impossible" not in (out / "compare.md").read_text()
