"""`copd train` on a run directory whose newest checkpoint is damaged, with --resume-from, and with another layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console
from tiny_run import Command, comparable

from copd_megatron.conductor import run
from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import ConfigError, WeightsError

RESULTS = ("branches/*/final", "merged", "evaluation.json", "snapshots")


def as_if_killed(finished: Command, folder: Path, base: Path, **changes: object) -> Command:
    """A copy of a finished run, without what came after its last checkpoint."""
    shutil.copytree(finished.run, folder / "run")
    for pattern in RESULTS:
        for path in (folder / "run").glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return Command(folder, base, **changes)


@pytest.fixture
def stopped(tmp_path: Path, undisturbed: Command, base: Path) -> Command:
    return as_if_killed(undisturbed, tmp_path, base)


def config_of(command: Command) -> RunConfig:
    return load_config(command.config, [], RunConfig)


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
def test_damaged_newest_checkpoint_is_refused_and_an_older_one_ends_in_the_same_bits(
    stopped: Command, undisturbed: Command
) -> None:
    assert stopped.checkpoints().steps() == [5, 6]
    flip_a_byte(stopped.checkpoints().part("image", 6) / "__0_0.distcp")
    status, output = stopped.finish()
    output = " ".join(output.split())
    assert status == 1
    assert "__0_0.distcp differs from its checksum" in output
    assert "newest usable checkpoint is that of step 5: add --resume-from 5" in output
    assert "same command continues" not in output
    assert stopped.checkpoints().steps() == [5, 6], "nothing has been given up"

    status, output = stopped.finish(stopped.start("--resume-from", "5"))
    assert status == 0, output
    assert "continuing from step 5" in output
    assert stopped.weights() == undisturbed.weights()
    for name in ("text", "image"):
        assert comparable(stopped.lines(name)) == comparable(undisturbed.lines(name))
    assert stopped.checkpoints().steps() == [5, 6]
    assert all(stopped.checkpoints().problem(step, contents=True) is None for step in (5, 6))


def test_damage_that_shows_without_reading_is_refused_before_anything_starts(stopped: Command) -> None:
    (stopped.checkpoints().part("text", 6) / "state.json").unlink()
    with pytest.raises(WeightsError, match=r"step 6 cannot be used: .*state\.json is missing.* --resume-from 5"):
        run(config_of(stopped), Console(quiet=True))
    with pytest.raises(WeightsError, match=r"step 6 cannot be used"):
        run(config_of(stopped), Console(quiet=True), resume_from=6)
    assert stopped.checkpoints().steps() == [5, 6]


def test_unknown_step_is_refused_with_those_that_there_are(stopped: Command) -> None:
    with pytest.raises(ConfigError, match=r"--resume-from 4: .* has no such checkpoint; there are: 5, 6 \(0: base\)"):
        run(config_of(stopped), Console(quiet=True), resume_from=4)
    assert stopped.checkpoints().steps() == [5, 6]


def test_finished_run_is_not_taken_back_unasked(undisturbed: Command) -> None:
    with pytest.raises(ConfigError, match="is trained to the end"):
        run(config_of(undisturbed), Console(quiet=True), resume_from=5)
    assert (undisturbed.run / "merged").exists()


def last_update(command: Command, branch: str) -> dict:
    return [line for line in command.lines(branch) if line["phase"] == "exchange"][-1]


def positions(command: Command, branch: str, step: int) -> dict[str, int]:
    """How far the branch's streams are at a checkpoint."""
    ranks = json.loads((command.checkpoints().part(branch, step) / "state.json").read_text())["ranks"]
    streams = [rank["streams"] for rank in ranks if rank["streams"] is not None]
    return {name: max(stream[name]["sampler"]["position"] for stream in streams) for name in streams[0]}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"world": 2, "pp": 2}, {"world": 2}], ids=["pipeline", "replicas"])
def test_run_goes_on_in_another_layout(tmp_path: Path, base: Path, undisturbed: Command, parallel: dict) -> None:
    branches = [
        {"name": "text", "data": {"mini": {"modality": "text"}}, "parallel": parallel},
        {"name": "image", "data": {"mini": {"modality": "image"}}},
    ]
    command = as_if_killed(undisturbed, tmp_path, base, branches=branches)
    status, output = command.finish(command.start("--resume-from", "5"))
    assert status == 0, output
    assert "branches.text.parallel.world: 1 -> 2" in " ".join(output.split())
    for name in ("text", "image"):
        assert positions(command, name, 6) == positions(undisturbed, name, 6)
        there, here = last_update(undisturbed, name), last_update(command, name)
        assert here["step"] == there["step"] == 6
        if "pp" in parallel:  # replicas draw their responses by other names
            assert here["loss"] == pytest.approx(there["loss"], rel=1e-3, abs=1e-4)
            assert here["reward/mean"] == there["reward/mean"]


@pytest.mark.slow
def test_frozen_teachers_survive_without_their_snapshots(tmp_path: Path, base: Path) -> None:
    settings = {
        "teacher": {"refresh": "phase"},
        "rhythm": {"cycles": 1, "explore_steps": 2, "exchange_steps": 3},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    whole = Command(tmp_path / "whole", base, **settings)
    status, output = whole.finish()
    assert status == 0, output
    assert whole.checkpoints().steps() == [1, 2, 3, 4, 5]
    frozen = [step for step in range(1, 6) if list(whole.checkpoints().part("text", step).glob("version_*"))]
    assert frozen == [3, 4], "in the middle of Phase II, and only there"

    command = as_if_killed(whole, tmp_path / "resumed", base, **settings)
    status, output = command.finish(command.start("--resume-from", "4"))
    assert status == 0, output
    assert command.weights() == whole.weights()
