"""A merge writes the Megatron checkpoint that its Hugging Face folder would be converted to, whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import family
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader

from copd_megatron import cli
from copd_megatron.errors import WeightsError
from copd_megatron.policy.manifest import problem
from copd_megatron.weights import megatron_source
from copd_megatron.weights.convert import to_hf, to_megatron
from copd_megatron.weights.crew import Crew
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.megatron_source import MegatronSource
from copd_megatron.weights.merge import rows
from copd_megatron.weights.merge.folders import merge_folders
from copd_megatron.weights.merge.recipe import Recipe

TIES = Recipe("ties", density=0.3)
SHARD = 20_000


def files(folder: Path) -> dict[str, Any]:
    """The content of every file in a folder and below; a checkpoint's index without its random name."""
    found: dict[str, Any] = {
        str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()
    }
    if ".metadata" in found:
        index = FileSystemReader(folder).read_metadata()
        found |= {".metadata": (index.state_dict_metadata, index.storage_data), "manifest.json": "holds its checksum"}
        assert problem(folder, contents=True) is None
    return found


@pytest.fixture
def models(save_model: Callable[..., Path]) -> list[Path]:
    """A base and two branches with three experts in every layer."""
    return [save_model(seed, torch.bfloat16, 3) for seed in range(3)]


@pytest.fixture
def expected(models: list[Path], tmp_path: Path) -> Path:
    """The checkpoint converted from the merged folder `merged`, both by `TIES`."""
    merge_folders(models[1:], tmp_path / "merged", models[0], TIES, max_shard_bytes=SHARD)
    to_megatron(tmp_path / "merged", tmp_path / "expected")
    return tmp_path / "expected"


@pytest.mark.parametrize("ahead", [0, rows.AHEAD_BYTES])
def test_megatron_output_is_the_merged_folder_converted(
    models: list[Path], expected: Path, tmp_path: Path, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "AHEAD_BYTES", ahead)
    merge_folders(models[1:], None, models[0], TIES, megatron=tmp_path / "out", jobs=3)
    assert files(tmp_path / "out") == files(expected)


def test_one_merge_writes_both_forms(models: list[Path], expected: Path, tmp_path: Path) -> None:
    out, megatron = tmp_path / "both", tmp_path / "out"
    merge_folders(models[1:], out, models[0], TIES, max_shard_bytes=SHARD, megatron=megatron)
    assert files(out) == files(tmp_path / "merged")
    assert files(megatron) == files(expected)
    with pytest.raises(WeightsError, match="both: is not empty"):
        merge_folders(models[1:], out, models[0], TIES, max_shard_bytes=SHARD, megatron=megatron)


def test_megatron_inputs_and_output(models: list[Path], tmp_path: Path) -> None:
    merge_folders(models[1:], None, models[0], megatron=tmp_path / "expected")
    checkpoints = [model.with_suffix(".megatron") for model in models[1:]]
    for model, checkpoint in zip(models[1:], checkpoints, strict=True):
        to_megatron(model, checkpoint)
    merge_folders(checkpoints, None, models[0], megatron=tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_merging_megatron_inputs_reads_each_row_once(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_megatron(models[1], tmp_path / "checkpoint")
    read: list[str] = []
    whole = MegatronSource._read

    def counted(self: MegatronSource, place: megatron_source.Place) -> torch.Tensor:
        read.append(place.entry.hf[0])
        return whole(self, place)

    monkeypatch.setattr(MegatronSource, "_read", counted)
    merge_folders([tmp_path / "checkpoint"], tmp_path / "out", models[0], jobs=1)
    assert len(read) == len(set(read))
    assert len(read) < len(HfFolder(models[0]).names())


@pytest.mark.slow
def test_two_processes_write_the_same_model(models: list[Path], expected: Path, tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "copd_megatron.cli"]
    arguments = [*map(str, models[1:]), "--base", str(models[0]), "--method", "ties", "--density", "0.3"]
    output = ["--megatron", str(tmp_path / "out"), "--report", str(tmp_path / "out.json")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, *torchrun, "merge", *arguments, *output], env=environment, check=True, timeout=200)
    assert {file.name for file in (tmp_path / "out").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    to_hf(tmp_path / "out", tmp_path / "again", max_shard_bytes=SHARD)
    to_hf(expected, tmp_path / "expected_again", max_shard_bytes=SHARD)
    assert files(tmp_path / "again") == files(tmp_path / "expected_again")
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["tensors"].keys() == set(HfFolder(models[0]).names())


KILLED = """
import os, signal, sys
from pathlib import Path
from copd_megatron.weights import megatron_writer
from copd_megatron.weights.merge import folders, recipe
write, left = megatron_writer._write_record, iter(range(5, -1, -1))

def write_or_die(*row):
    if next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    yield from write(*row)

megatron_writer._write_record = write_or_die
base, megatron, out, *inputs = map(Path, sys.argv[1:])
folders.merge_folders(inputs, out if out.name != "none" else None, base, recipe.Recipe("ties", density=0.3),
                      max_shard_bytes=20_000, megatron=megatron)
"""


@pytest.mark.parametrize("both", [False, True])
def test_killed_merge_leaves_nothing_that_loads_and_can_be_repeated(
    models: list[Path], expected: Path, tmp_path: Path, both: bool
) -> None:
    out = tmp_path / ("both" if both else "none")
    command = [sys.executable, "-c", KILLED, *map(str, (models[0], tmp_path / "out", out, *models[1:]))]
    assert subprocess.run(command, timeout=100, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not out.exists()
    assert list(tmp_path.glob(".out.*.tmp/*.distcp"))  # it had begun
    shards = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".both.partial").glob("*.safetensors")}
    assert bool(shards) == both
    target = out if both else None
    merge_folders(models[1:], target, models[0], TIES, max_shard_bytes=SHARD, megatron=tmp_path / "out")
    assert files(tmp_path / "out") == files(expected)
    if both:
        assert files(out) == files(tmp_path / "merged")
        assert {name: (out / name).stat().st_mtime_ns for name in shards} == shards
    assert not list(tmp_path.glob(".*"))


def test_sick_model_is_named_and_leaves_nothing(models: list[Path], tmp_path: Path) -> None:
    name = "model.language_model.layers.1.mlp.experts.down_proj"
    tensors = {key: tensor.clone() for key, tensor in HfFolder(models[2]).tensors()}
    tensors[name][1, 2, 3] = torch.inf
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, models[2] / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"model2: tensor {name} holds NaN or infinite values"):
        merge_folders(models[1:], None, models[0], megatron=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_report_of_a_merge_into_a_checkpoint_is_that_of_one_into_a_folder(models: list[Path], tmp_path: Path) -> None:
    merge_folders(models[1:], tmp_path / "folder", models[0], report=tmp_path / "folder.json")
    merge_folders(models[1:], None, models[0], report=tmp_path / "out.json", megatron=tmp_path / "out")
    assert (tmp_path / "out.json").read_text() == (tmp_path / "folder.json").read_text()


def test_model_that_the_policy_does_not_know_is_refused_before_any_work(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    with pytest.raises(WeightsError, match="llama"):
        merge_folders(inputs, tmp_path / "out", base, megatron=tmp_path / "checkpoint")
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob("*checkpoint*"))


def test_merge_without_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, inputs = family(tmp_path, 2)
    monkeypatch.setattr(sys, "argv", ["copd", "merge", *map(str, inputs), "--base", str(base)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 2
    assert "nothing to write: name a Hugging Face folder (-o)" in capsys.readouterr().err


def test_processes_share_the_checksums_of_a_checkpoint(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_megatron(models[1], tmp_path / "checkpoint")
    summed: list[list[str]] = []
    checksum = megatron_source.checksum

    def counted(path: Path) -> str:
        summed[-1].append(path.name)
        return checksum(path)

    class Member(Crew):
        """One of two processes, whose fellow has nothing to say."""

        def gathered(self, value: object) -> list[object]:  # type: ignore[override]
            return [value]

    monkeypatch.setattr(megatron_source, "checksum", counted)
    for rank in range(2):
        summed.append([])
        MegatronSource(tmp_path / "checkpoint", crew=Member(rank, 2))
    assert sorted(summed[0] + summed[1]) == sorted(
        json.loads((tmp_path / "checkpoint/manifest.json").read_text())["files"]
    )
    assert summed[0]
    assert summed[1]
