"""Which checkpoints of a run count, and what is said about those that do not. No process is started here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import TINY

from copd_megatron.config import RunConfig
from copd_megatron.config.training import CheckpointConfig
from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.fingerprint import fingerprint
from copd_megatron.policy.manifest import FORMAT, describe, write_manifest
from copd_megatron.run_checkpoints import RunCheckpoints, description
from copd_megatron.run_folder import RunFolder

NAMES = ["text", "image"]


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(bytes(range(256)) * 40_000)
    return changed(TINY, base=str(base), run_dir=str(tmp_path / "run"))


@pytest.fixture
def checkpoints(config: RunConfig) -> RunCheckpoints:
    folder = RunFolder(config.run_dir)
    folder.open(config)
    return RunCheckpoints(folder, NAMES)


def changed(config: RunConfig | dict, **changes: object) -> RunConfig:
    plain = config if isinstance(config, dict) else config.model_dump(mode="json")
    return RunConfig.model_validate({**plain, **changes})


def write_part(checkpoints: RunCheckpoints, branch: str, step: int) -> Path:
    folder = checkpoints.part(branch, step)
    folder.mkdir(parents=True)
    (folder / "shard.distcp").write_bytes(f"{branch} {step}".encode() * 100)
    write_manifest(folder, {"shard.distcp": describe(folder / "shard.distcp")})
    return folder


def commit(checkpoints: RunCheckpoints, config: RunConfig, *steps: int) -> None:
    for step in steps:
        for branch in NAMES:
            write_part(checkpoints, branch, step)
        parts = {branch: checkpoints.entry(branch, step) for branch in NAMES}
        content = {"cycle": 0, "phase": "explore", **description(config, fingerprint(config.base))}
        checkpoints.commit(step, content, parts)


def run_manifest(config: RunConfig, step: int) -> Path:
    return Path(config.run_dir) / "checkpoints" / f"step_{step:07d}.json"


def test_committed_checkpoint_says_what_it_holds(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, 5)
    content = json.loads(run_manifest(config, 5).read_text())
    assert (content["format"], content["step"], content["cycle"], content["phase"]) == (FORMAT, 5, 0, "explore")
    assert content["topology"] == [["text", "image"], ["image", "text"]]
    assert content["branches"]["text"] == checkpoints.entry("text", 5)
    assert checkpoints.problem(5, config, contents=True) is None
    checkpoints.require(5, config)


def test_parts_without_the_runs_manifest_do_not_count_and_are_cleared(
    checkpoints: RunCheckpoints, config: RunConfig
) -> None:
    commit(checkpoints, config, 5)
    for branch in NAMES:
        write_part(checkpoints, branch, 10)
    (checkpoints.part("text", 15).parent / ".step_0000015.tmp").mkdir()
    (checkpoints.part("text", 15).parent / "notes.txt").write_text("stays")
    assert checkpoints.steps() == [5]
    assert checkpoints.newest() == 5
    checkpoints.clear("text")
    assert sorted(path.name for path in checkpoints.part("text", 5).parent.iterdir()) == ["notes.txt", "step_0000005"]
    assert checkpoints.part("image", 10).exists(), "another branch's folder is not touched"


def test_the_newest_every_so_many_and_chosen_ones_are_kept(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, *range(1, 10))
    write_part(checkpoints, "text", 10)  # on its way
    checkpoints.prune(2, CheckpointConfig(keep_every_steps=4, at_steps=(3,)).keeps)
    assert checkpoints.steps() == [3, 4, 8, 9]
    checkpoints.clear("text", before=9)
    assert sorted(path.name for path in checkpoints.part("text", 4).parent.iterdir()) == [
        f"step_{step:07d}" for step in (3, 4, 8, 9, 10)
    ]
    assert all(checkpoints.problem(step, config, contents=True) is None for step in checkpoints.steps())


def damage_shard(folder: Path) -> str:
    content = bytearray((folder / "shard.distcp").read_bytes())
    content[7] ^= 1
    (folder / "shard.distcp").write_bytes(content)
    return "shard.distcp differs from its checksum"


def lose_shard(folder: Path) -> str:
    (folder / "shard.distcp").unlink()
    return "shard.distcp is missing"


def cut_shard(folder: Path) -> str:
    (folder / "shard.distcp").write_bytes(b"short")
    return "shard.distcp has 5 bytes, manifest.json says"


def lose_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "there is no manifest.json"


def lose_part(folder: Path) -> str:
    shutil.rmtree(folder)
    return "there is no manifest.json"


def exchange_part(folder: Path) -> str:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step_0000005"), folder)
    return "manifest.json is not the one that"


@pytest.mark.parametrize("damage", [damage_shard, lose_shard, cut_shard, lose_manifest, lose_part, exchange_part])
@pytest.mark.parametrize("branch", NAMES)
def test_damage_to_any_branch_is_found(checkpoints: RunCheckpoints, config: RunConfig, damage, branch: str) -> None:
    commit(checkpoints, config, 5, 10)
    reason = damage(checkpoints.part(branch, 10))
    assert reason in (checkpoints.problem(10, config, contents=True) or "")
    if damage is not damage_shard:  # what needs no reading of large files is found before anything starts
        with pytest.raises(WeightsError, match=reason) as raised:
            checkpoints.require(10, config)
        assert str(checkpoints.part(branch, 10)) in str(raised.value)
        assert "newest usable checkpoint is that of step 5: add --resume-from 5" in str(raised.value)
    assert checkpoints.problem(5, config, contents=True) is None


def test_advice_reads_the_candidates_whole(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, 3, 5, 10)
    lose_shard(checkpoints.part("text", 10))
    damage_shard(checkpoints.part("image", 5))
    with pytest.raises(WeightsError, match="that of step 3: add --resume-from 3"):
        checkpoints.require(10, config)
    lose_part(checkpoints.part("image", 3))
    with pytest.raises(WeightsError, match="add --resume-from 0 to start again from the base"):
        checkpoints.require(10, config)


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_damaged_run_manifest_is_refused_and_not_passed_over(
    checkpoints: RunCheckpoints, config: RunConfig, cut: int
) -> None:
    commit(checkpoints, config, 5, 10)
    file = run_manifest(config, 10)
    file.write_text(file.read_text()[:cut] if cut >= 0 else file.read_text().replace('"explore"', '"exchange"'))
    assert checkpoints.newest() == 10
    with pytest.raises(WeightsError, match=r"step 10 cannot be used: .*damaged.* --resume-from 5"):
        checkpoints.require(10, config)


def test_newer_format_is_refused(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, 5)
    content = json.loads(run_manifest(config, 5).read_text())
    run_manifest(config, 5).write_text(json.dumps({**content, "format": FORMAT + 1}))
    with pytest.raises(WeightsError, match=f"format {FORMAT + 1}, this version reads up to {FORMAT}"):
        checkpoints.require(5, config)


def test_other_configuration_is_refused_with_the_difference(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, 5)
    other = changed(config, optimizer={"lr": 0.5})
    with pytest.raises(WeightsError, match=r"another configuration .*optimizer\.lr: 0\.001 -> 0\.5"):
        checkpoints.require(5, other)


def test_other_base_is_refused(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, 5)
    weights = Path(config.base) / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(bytes(reversed(range(256))) * 40_000)
    assert weights.stat().st_size == size
    with pytest.raises(WeightsError, match="trained from another base"):
        checkpoints.require(5, config)


def test_other_experts_are_refused(checkpoints: RunCheckpoints, config: RunConfig, tmp_path: Path) -> None:
    expert = tmp_path / "expert"
    shutil.copytree(config.base, expert)
    rhythm = {"cycles": 1, "explore_steps": 0, "exchange_steps": 5}
    taught = changed(config, method="mopd", rhythm=rhythm, experts={"text": str(expert), "image": str(expert)})
    commit(checkpoints, taught, 5)
    checkpoints.require(5, taught)
    (expert / "config.json").write_text('{"other": 1}')
    with pytest.raises(WeightsError, match="the expert 'text' was another one"):
        checkpoints.require(5, taught)


def test_fingerprint_sees_weights_and_settings_but_no_readme(config: RunConfig) -> None:
    base = Path(config.base)
    first = fingerprint(base)
    (base / "README.md").write_text("a base")
    assert fingerprint(base) == first
    (base / "tokenizer.json").write_text("{}")
    second = fingerprint(base)
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    assert len({first, second, fingerprint(base)}) == 3


def test_going_back_forgets_what_came_after(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    commit(checkpoints, config, 5, 10, 15)
    checkpoints.forget_after(5)
    for branch in NAMES:
        checkpoints.clear(branch)
    assert checkpoints.steps() == [5]
    assert not checkpoints.part("text", 10).exists()
    assert not checkpoints.part("image", 15).exists()


def test_frozen_teachers_come_back_from_the_checkpoint(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    for branch in NAMES:
        part = write_part(checkpoints, branch, 7)
        (part / "version_0000005.safetensors").write_bytes(branch.encode())
        names = ("shard.distcp", "version_0000005.safetensors")
        write_manifest(part, {name: describe(part / name) for name in names})
    checkpoints.restore_teachers(7)
    snapshots = RunFolder(config.run_dir).snapshots
    assert (snapshots / "image" / "version_0000005.safetensors").read_bytes() == b"image"
    (checkpoints.part("text", 7) / "version_0000005.safetensors").write_bytes(b"tixt")
    with pytest.raises(WeightsError, match=r"version_0000005\.safetensors: differs from its checksum"):
        checkpoints.restore_teachers(7)


def test_layout_engine_log_and_checkpoint_settings_may_change_in_a_continued_run(
    checkpoints: RunCheckpoints, config: RunConfig, tmp_path: Path
) -> None:
    commit(checkpoints, config, 5)
    plain = config.model_dump(mode="json")
    plain["branches"][0]["parallel"] |= {"world": 2, "pp": 2}
    plain["checkpoint"] |= {"keep": 7, "asynchronous": False}
    plain["log"]["tensorboard"] = True
    plain["rollout"]["max_rows"] = 3
    moved = changed(plain, run_dir=str(tmp_path / "elsewhere"))
    folder = RunFolder(config.run_dir)
    lines = folder.open(moved)
    assert "branches.text.parallel.pp: 1 -> 2" in lines
    assert "checkpoint.keep: 2 -> 7" in lines
    assert not any(line.startswith("run_dir") for line in lines)
    checkpoints.require(5, moved)
    assert folder.config() == config, "not before it is known that the run goes on"
    folder.adopt(moved)
    assert folder.config() == moved
    assert folder.open(moved) == []


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        (("optimizer", "lr"), 0.5, "optimizer.lr: 0.001 -> 0.5"),
        (("rl", "group"), 8, "rl.group: 4 -> 8"),
        (("rollout", "temperature"), 0.5, "rollout.temperature: 1.0 -> 0.5"),
        (("seed",), 3, "seed: 0 -> 3"),
        (("teacher", "refresh"), "phase", "teacher.refresh: 'step' -> 'phase'"),
        (("branches", 0, "data", "mini", "modality"), "image", "branches.text.data.mini.modality: 'text' -> 'image'"),
        (("precision", "params"), "bf16", "precision.params: 'fp32' -> 'bf16'"),
    ],
)
def test_whatever_changes_the_mathematics_is_refused(
    checkpoints: RunCheckpoints, config: RunConfig, path: tuple, value: object, line: str
) -> None:
    plain = config.model_dump(mode="json")
    place = plain
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError) as raised:
        RunFolder(config.run_dir).open(RunConfig.model_validate(plain))
    assert line in str(raised.value)


def test_order_of_branches_is_part_of_the_run(checkpoints: RunCheckpoints, config: RunConfig) -> None:
    plain = config.model_dump(mode="json")
    plain["branches"].reverse()
    with pytest.raises(ConfigError, match="order of branches"):
        RunFolder(config.run_dir).open(RunConfig.model_validate(plain))
