"""`copd pilot` with real runs: stopped, and continued with what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from copd_megatron.data.mini.model import build

STUDY = {
    "teacher": {"capability": "text", "updates": 3},
    "student": {"capability": "image", "updates": [0, 2, 15]},
    "budget": 2,
    "overlaps": [1, 5],
    "problems": 6,
    "least_advantage": 0.001,
    "replicates": 100,
    "common": {
        "branches": [{"name": name, "data": {"mini": {"modality": name}}} for name in ("text", "image")],
        "rl": {"prompts": 4, "group": 4},
        "opd": {"native_prompts": 0, "cross_prompts": 2},
        # An untrained model earns no reward; what moves it here is weight decay.
        "optimizer": {"lr": 0.01, "weight_decay": 2.0},
        "precision": {"params": "fp32", "max_tokens_per_microbatch": 2048},
        "rollout": {"max_new_tokens": 6},
        "data": {"max_prompt_tokens": 256},
        "log": {"overlap_k": 5, "probe_prompts": 4, "tensorboard": False},
        "eval": {"problems": 8},
    },
}


def start(file: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "copd_megatron.cli", "pilot", str(file), "--seeds", "1", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_study_goes_on_with_what_is_missing(tmp_path):
    build(tmp_path / "base", seed=0)
    out, file = tmp_path / "out", tmp_path / "pilot.yaml"
    content = {**STUDY, "out": "elsewhere", "common": {**STUDY["common"], "base": str(tmp_path / "base")}}
    file.write_text(yaml.safe_dump(content))

    process = start(file, out)
    metrics = out / "runs" / "rlvr_image_seed1" / "branches" / "image" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and metrics.read_text().count('"explore"') >= 3):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 130, output
    assert "stopped in expert image, seed 1; the same command goes on from there" in output
    assert (out / "runs/rlvr_text_seed1/models/step_0000002/config.json").exists()

    process = start(file, out)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "expert text, seed 1: training" not in output, "it was there"
    assert "continuing from step" in (out / "runs/rlvr_image_seed1.log").read_text()
    assert "image model of 15 updates, seed 1: measured" in output
    found = json.loads((out / "pilot.json").read_text())
    assert [student["updates"] for student in found["students"]] == [0, 2, 15]
    base, early, late = (student["predictors"] for student in found["students"])
    assert base["kl_base"]["mean"] == pytest.approx(0, abs=1e-5)
    assert 0 < early["kl_base"]["mean"] < late["kl_base"]["mean"], "each student is another model"
    started = json.loads((out / "runs/opd_2_seed1/branches/image/metrics.jsonl").read_text().splitlines()[0])
    assert (started["phase"], started["step"]) == ("probe", 0)
    assert started["kl_to_base"] > 0, "the student of two updates is what was distilled"

    process = start(file, out)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "training" not in output
    assert "measured" not in output

    content["problems"] = 5
    file.write_text(yaml.safe_dump(content))
    process = start(file, out)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    assert "training" not in output
    assert output.count("measured") == 6, "other problems are other measurements"
