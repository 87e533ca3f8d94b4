"""Merging is timed only where results agree, from inputs that are on the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_merge
import bench_merge_models
import pytest
import torch
from bench_merge import disk, let_go, run, table
from bench_merge_models import compare, make

from copd_megatron.weights.hf import HfFolder, write_folder
from copd_megatron.weights.merge.folders import merge_folders
from copd_megatron.weights.merge.recipe import Recipe


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A base and three branches of one small layer."""
    for name, size in (("HIDDEN", 64), ("INNER", 96), ("VOCABULARY", 128)):
        monkeypatch.setattr(bench_merge_models, name, size)
    return make(tmp_path, 1e-4)


def test_branches_have_values_of_their_own_near_the_base(models: list[Path]) -> None:
    base, *branches = map(HfFolder, models)
    assert len(branches) == bench_merge_models.BRANCHES
    assert len(base.shards()) > 1
    for branch in branches:
        away = branch.tensor("lm_head.weight").float() - base.tensor("lm_head.weight").float()
        assert 5e-4 < float(away.std()) < 2e-3


@pytest.mark.parametrize("method", bench_merge.METHODS)
def test_results_that_differ_stop_the_benchmark(models: list[Path], tmp_path: Path, method: str) -> None:
    recipe = Recipe(method, density=bench_merge_models.DENSITY if method == "ties" else None)
    merge_folders(models[1:], tmp_path / "one", models[0], recipe)
    found = compare(method, models, tmp_path / "one", tmp_path / "one")
    assert found["elements"] == sum(tensor.numel() for _, tensor in HfFolder(models[0]).tensors())
    tensors = {name: tensor.clone() for name, tensor in HfFolder(tmp_path / "one").tensors()}
    largest = int(tensors["lm_head.weight"].view(-1).abs().argmax())
    tensors["lm_head.weight"].view(-1)[largest] *= 1.05
    write_folder(tmp_path / "other", tensors.items(), models[0])
    with pytest.raises(SystemExit, match=f"{method}: 1 of .* elements of lm_head.weight differ"):
        compare(method, models, tmp_path / "one", tmp_path / "other")


def test_inputs_leave_the_page_cache_unless_they_are_to_stay(models: list[Path]) -> None:
    for path in models:
        for file in path.glob("*.safetensors"):
            file.read_bytes()
    if let_go(models, warm=True) < 1:
        pytest.skip("this file system keeps nothing in the page cache")
    assert let_go(models, warm=False) < 0.1


def test_disk_reads_and_writes_as_many_bytes_as_a_merge(models: list[Path], tmp_path: Path) -> None:
    spent = disk(models[1:], tmp_path / "plain")
    assert spent["seconds"] > 0
    written = {file.name: file.stat().st_size for file in (tmp_path / "plain").iterdir()}
    assert written == {file.name: file.stat().st_size for file in models[1].glob("*.safetensors")}


def test_a_command_that_fails_is_an_error_with_its_last_words(models: list[Path], tmp_path: Path) -> None:
    command = bench_merge.ours("linear", models, tmp_path / "out")
    command[command.index("--base") + 1] = str(tmp_path / "absent")
    with pytest.raises(SystemExit, match="absent"):
        run(command, tmp_path / "out")


def test_a_merge_is_timed_with_its_memory(models: list[Path], tmp_path: Path) -> None:
    facts = run(bench_merge.ours("linear", models, tmp_path / "out"), tmp_path / "out")
    assert torch.equal(
        HfFolder(tmp_path / "out").tensor("model.norm.weight"),
        torch.stack([HfFolder(path).tensor("model.norm.weight").float() for path in models[1:]]).mean(0).bfloat16(),
    )
    assert 0 < facts["cpu"] < 60
    assert 100 < facts["peak_mib"] < 1500


def test_table_has_a_row_for_each_size_and_method() -> None:
    def row(method: str) -> dict[str, Any]:
        seconds = {"copd": 2.0, "mergekit": 8.0, "disk": 2.5}
        peaks = {"copd": 250.0, "mergekit": 2100.0}
        ratios = {"of_mergekit": 0.25, "of_disk": 0.8}
        return {"method": method, "seconds": seconds, "cpu_seconds": seconds, "peak_mib": peaks, **ratios}

    sizes = [{"gigabytes": 12.0, "branches": 3, "warm": False, "methods": [row("linear"), row("ties")]}]
    machine = {"cpu": "c", "cores": 2, "load": 0.5}
    text = table({"date": "2000-01-01", "machine": machine, "torch": "2", "repeats": 2, "sizes": sizes})
    assert "| 4.00 GB | linear | 2.0 / 2.0 | 8.0 / 8.0 | 2.5 / 2.5 | 0.25 | 0.80 | 250 | 2,100 |" in text
    assert "read from the disk; best of 2" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
