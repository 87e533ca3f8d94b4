"""The three-branch configuration for one short cycle: text, image and video, with text as the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY, Command

CONFIG = Path(__file__).parents[2] / "configs" / "mini" / "text_image_video.yaml"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_cycle(base: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(CONFIG.read_text())
    kept = {key: content[key] for key in ("branches", "optimizer", "topology")}
    command = Command(tmp_path, base, **kept, rhythm=TINY["rhythm"] | {"explore_steps": 2, "exchange_steps": 2})
    status, output = command.finish(timeout=800)
    assert status == 0, output
    teachers = {"text": {"image", "video"}, "image": {"text"}, "video": {"text"}}
    for branch, expected in teachers.items():
        lines = command.lines(branch)
        updates = [line for line in lines if line["phase"] in ("explore", "exchange")]
        assert [line["step"] for line in updates] == [1, 2, 3, 4]
        # The engine's log-probabilities of videos, too, are those of the policy.
        assert all(line["mismatch/kl"] < 1e-8 for line in updates)
        found = {key.partition("/")[2] for line in updates for key in line if key.startswith("overlap/")}
        assert found == expected
    models = json.loads((command.run / "evaluation.json").read_text())["models"]
    assert [model["name"] for model in models] == ["base", "text branch", "image branch", "video branch", "merged"]
    assert set(models[-1]["capabilities"]) == {"text", "image", "video"}
