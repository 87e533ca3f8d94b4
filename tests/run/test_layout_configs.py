"""Every configuration under configs/mini/layouts, for one short cycle: both phases, checkpoints, merge and table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY, Command

from copd_megatron.data.mini.model import ModelSize, build

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "mini" / "layouts").glob("*.yaml"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Untrained models by their number of experts."""
    folder = tmp_path_factory.mktemp("bases")
    for experts in (0, 4):
        build(folder / str(experts), 0, ModelSize(experts=experts))
    return {experts: folder / str(experts) for experts in (0, 4)}


def test_there_is_a_configuration_per_family() -> None:
    degrees = [branch["parallel"] for config in CONFIGS for branch in yaml.safe_load(config.read_text())["branches"]]
    for name in ("tp", "pp", "vpp", "cp", "ep"):
        assert any(degree.get(name, 1) > 1 for degree in degrees), name
    assert any(degree.get("sequence_parallel") for degree in degrees)
    assert {"world": 2} in degrees, "data parallelism alone"


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_one_cycle(config: Path, bases: dict[int, Path], tmp_path: Path) -> None:
    content = yaml.safe_load(config.read_text())
    experts = 4 if "experts4" in content["base"] else 0
    kept = {key: content[key] for key in ("branches", "optimizer", "topology")}
    command = Command(
        tmp_path, bases[experts], **kept, rhythm=TINY["rhythm"] | {"explore_steps": 2, "exchange_steps": 2}
    )
    status, output = command.finish()
    assert status == 0, output
    for branch in ("text", "image"):
        lines = command.lines(branch)
        assert [line["step"] for line in lines if line["phase"] == "explore"] == [1, 2]
        exchanged = [line for line in lines if line["phase"] == "exchange"]
        assert [line["step"] for line in exchanged] == [3, 4]
        # The engine's log-probabilities are those of the weights that the gang has: it got all shards of all of them.
        assert all(line["mismatch/kl"] < 1e-8 for line in lines if line["phase"] != "probe")
    models = json.loads((command.run / "evaluation.json").read_text())["models"]
    assert [model["name"] for model in models] == ["base", "text branch", "image branch", "merged"]
