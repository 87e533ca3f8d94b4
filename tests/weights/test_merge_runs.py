"""A merge gives the same bytes whatever happens on the way: any number of threads and processes, kills, reruns."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import content, family, save, values
from rich.console import Console

from copd_megatron import cli
from copd_megatron.errors import WeightsError
from copd_megatron.weights.crew import Crew
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.hf_shards import plan_shards
from copd_megatron.weights.merge import work
from copd_megatron.weights.merge.folders import merge_folders
from copd_megatron.weights.merge.partial import PartialFolder
from copd_megatron.weights.merge.recipe import METHODS, Recipe
from copd_megatron.weights.merge.stream import BLOCK
from copd_megatron.weights.tensor_files import Form, TensorWriter

SHARD = 12_000  # bytes; makes a handful of shards
CLI = ["-m", "copd_megatron.cli", "merge"]


def _files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _arguments(inputs: Sequence[Path], base: Path, out: Path, *options: str) -> list[str]:
    return [*map(str, inputs), "--base", str(base), "-o", str(out), *options]


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_slices_do_not_change_a_bit(tmp_path: Path, method: str) -> None:
    base, inputs = family(tmp_path, 2, torch.bfloat16)
    for name, jobs, chunk in (("one", 1, BLOCK), ("four", 4, 4 * BLOCK)):
        merge_folders(
            inputs, tmp_path / name, base, Recipe(method, seed=7), max_shard_bytes=SHARD, jobs=jobs, chunk=chunk
        )
    assert _files(tmp_path / "one") == _files(tmp_path / "four")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 3


def test_two_processes_of_torchrun_write_what_one_writes(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 3)
    options = ["--method", "dare_ties", "--density", "0.4", "--seed", "3", "--shard-megabytes", "0.012"]
    merge_folders(inputs, tmp_path / "one", base, Recipe("dare_ties", density=0.4, seed=3), max_shard_bytes=SHARD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = _arguments(inputs, base, tmp_path / "two", *options)
    done = subprocess.run([*torchrun, *CLI, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert _files(tmp_path / "two") == _files(tmp_path / "one")
    assert done.stdout.count("merged 3 models") == 1
    assert not list(tmp_path.glob(".two*"))


def test_an_error_of_one_process_ends_all_with_that_error(tmp_path: Path) -> None:
    base, (first, second) = family(tmp_path, 2)
    sick = {name: tensor.clone() for name, tensor in HfFolder(second).tensors()}
    shards = plan_shards({name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in sick.items()}, SHARD)
    second_share = Crew(1, 2).share([shard.nbytes for shard in shards])
    name = next(iter(shards[second_share[0]].forms))
    sick[name].view(-1)[0] = math.nan
    save(second, sick)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    gang = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = _arguments([first, second], base, tmp_path / "out", "--shard-megabytes", "0.012")
    processes = [
        subprocess.Popen(
            [sys.executable, *CLI, *arguments],
            env={**os.environ, **gang, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1, 1]
    assert f"error: process 1: {second}: tensor {name} holds NaN" in errors[0]
    assert f"error: {second}: tensor {name} holds NaN" in errors[1]
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from copd_megatron.weights.merge import folders, partial, recipe
record, count = partial.PartialFolder.record, 0

def record_or_die(self, shard, records):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    record(self, shard, records)

partial.PartialFolder.record = record_or_die
base, out, *inputs = map(Path, sys.argv[1:])
folders.merge_folders(inputs, out, base, recipe.Recipe("ties", density=0.3), max_shard_bytes=12_000, jobs=1)
"""


def _kill(base: Path, inputs: Sequence[Path], out: Path) -> None:
    """A merge by ties that has finished two shards when it is killed."""
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, (base, out, *inputs))], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()


def test_a_killed_merge_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2, torch.bfloat16)
    recipe = Recipe("ties", density=0.3)
    merge_folders(inputs, tmp_path / "whole", base, recipe, max_shard_bytes=SHARD)
    _kill(base, inputs, tmp_path / "out")
    finished = sorted((tmp_path / ".out.partial" / ".merge").glob("model-*.json"))
    assert len(finished) == 2
    written = {file.stem: (tmp_path / ".out.partial" / file.stem).stat().st_mtime_ns for file in finished}
    merge_folders(inputs, tmp_path / "out", base, recipe, max_shard_bytes=SHARD)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == written
    assert not (tmp_path / ".out.partial").exists()


def test_a_shard_that_was_damaged_since_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base, inputs = family(tmp_path, 2, torch.bfloat16)
    recipe = Recipe("ties", density=0.3)
    merge_folders(inputs, tmp_path / "whole", base, recipe, max_shard_bytes=SHARD)
    _kill(base, inputs, tmp_path / "out")
    file = sorted((tmp_path / ".out.partial" / ".merge").glob("model-*.json"))[0].stem
    with open(tmp_path / ".out.partial" / file, "r+b") as damaged:
        damaged.seek(-1, os.SEEK_END)
        last = damaged.read(1)[0]
        damaged.seek(-1, os.SEEK_END)
        damaged.write(bytes([last ^ 1]))
    merge_folders(inputs, tmp_path / "out", base, recipe, max_shard_bytes=SHARD)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert f"{file}: is not as it was written; it is made again" in caplog.text


@pytest.mark.parametrize("change", ["parameter", "input"])
def test_what_another_merge_left_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str) -> None:
    base, inputs = family(tmp_path, 2, torch.bfloat16)
    _kill(base, inputs, tmp_path / "out")
    recipe = Recipe("ties", density=0.3)
    if change == "parameter":
        recipe = Recipe("ties", density=0.4)
    else:
        save(inputs[1], values(9, values(0)), torch.bfloat16)
    merge_folders(inputs, tmp_path / "whole", base, recipe, max_shard_bytes=SHARD)
    merge_folders(inputs, tmp_path / "out", base, recipe, max_shard_bytes=SHARD)
    assert _files(tmp_path / "out") == _files(tmp_path / "whole")
    assert "starting anew" in caplog.text


def test_the_error_that_stopped_the_others_is_raised_even_if_it_is_the_last_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, inputs = family(tmp_path, 2)
    others_stopped = threading.Event()
    write_tensor = work._write_tensor

    def write(merge: work.Merge, name: str, *rest: Any) -> dict[str, Any]:
        if name == "lm_head.weight":
            raise LateError(others_stopped)
        return write_tensor(merge, name, *rest)

    class LateError(WeightsError):
        """Takes its time to end its thread."""

        def __init__(self, event: threading.Event) -> None:
            super().__init__("the cause")
            self.event = event

    submit = work.ThreadPoolExecutor.submit

    def late(pool: Any, task: Any, *arguments: Any) -> Any:
        def run() -> None:
            try:
                task(*arguments)
            except LateError:
                others_stopped.wait(10)
                raise
            except BaseException:
                others_stopped.set()
                raise

        return submit(pool, run)

    monkeypatch.setattr(work, "_write_tensor", write)
    monkeypatch.setattr(work.ThreadPoolExecutor, "submit", late)
    with pytest.raises(WeightsError, match="the cause"):
        merge_folders(inputs, tmp_path / "out", base, max_shard_bytes=SHARD, jobs=2)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_finished_does_not_get_its_name(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2, torch.bfloat16)
    _kill(base, inputs, tmp_path / "out")
    forms = {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in HfFolder(base).tensors()}
    with pytest.raises(ValueError, match="not finished: model-0000"):
        PartialFolder(tmp_path / "out").furnish(plan_shards(forms, SHARD), base)
    assert not (tmp_path / "out").exists()


def test_two_merges_into_one_folder_are_refused(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    with PartialFolder(tmp_path / "out").held(), pytest.raises(WeightsError, match="another merge is writing"):
        merge_folders(inputs, tmp_path / "out", base)


def test_a_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = family(tmp_path, 2)
    merge_folders(inputs, tmp_path / "out", base)
    before = content(tmp_path / "out")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(WeightsError, match=r"could not be written .*; it is as it was before"):
        merge_folders(inputs[:1], tmp_path / "out", base, overwrite=True)
    assert content(tmp_path / "out") == before


def test_each_shard_has_a_line_in_the_log_and_a_terminal_a_bar(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, inputs = family(tmp_path, 2)
    console = Console(force_terminal=True, record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    with caplog.at_level(logging.INFO):
        merge_folders(inputs, tmp_path / "out", base, max_shard_bytes=SHARD, console=console)
    shards = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert [any(record.getMessage().startswith(f"{name}: ") for record in caplog.records) for name in shards] == [
        True
    ] * len(shards)
    assert f"{len(shards)} of {len(shards)} files" in caplog.text
    bar = console.export_text()
    assert "merging" in bar
    assert "/s" in bar


def test_report_says_how_far_models_are_from_the_base_and_from_each_other(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    merge_folders(inputs, tmp_path / "out", base, max_shard_bytes=SHARD, report=tmp_path / "report" / "merge.json")
    report = json.loads((tmp_path / "report" / "merge.json").read_text())
    start, first, second = (dict(HfFolder(path).tensors()) for path in (base, *inputs))
    for layer, names in {
        "model.layers.1": [name for name in start if name.startswith("model.layers.1.")],
        "lm_head.weight": ["lm_head.weight"],
    }.items():
        origin, *deltas = (
            torch.cat([model[name].double().view(-1) - take * start[name].double().view(-1) for name in names])
            for model, take in ((start, 0), (first, 1), (second, 1))
        )
        facts = report["layers"][layer]
        assert facts["elements"] == len(origin)
        assert facts["distance"] == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-5)
        assert facts["relative"] == pytest.approx([float(delta.norm() / origin.norm()) for delta in deltas], rel=1e-5)
        cosine = float(deltas[0] @ deltas[1] / deltas[0].norm() / deltas[1].norm())
        assert facts["cosine"] == {"1-2": pytest.approx(cosine, abs=1e-5)}
        assert facts["conflicts"] == pytest.approx(float((deltas[0] * deltas[1] < 0).double().mean()))
    assert report["tensors"].keys() == start.keys()
    assert (tmp_path / "report" / "merge.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--weights", "0.5;0.5"], "--weights '0.5;0.5': expected numbers separated by commas"),
        (["--tensor-weights", "lm_head.weight"], "expected PATTERN=WEIGHTS"),
        (["--method", "ties", "--density", "0"], "expected more than 0 and at most 1"),
        (["--report", "report.html"], "expected the name of a .json file"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    complaint: str,
) -> None:
    base, inputs = family(tmp_path, 2)
    monkeypatch.setattr(sys, "argv", ["copd", "merge", *_arguments(inputs, base, tmp_path / "out", *options)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_reach_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = family(tmp_path, 2)
    options = [
        "--method",
        "dare_linear",
        "--weights",
        "0.7,0.6",
        "--tensor-weights",
        "*.0.mlp.*=0,1",
        "--density",
        "0.4",
        "--scale",
        "0.8",
    ]
    options += ["--normalise", "--seed", "5"]
    monkeypatch.setattr(sys, "argv", ["copd", "merge", *_arguments(inputs, base, tmp_path / "out", *options)])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    assert ending.value.code == 0
    recipe = Recipe("dare_linear", (0.7, 0.6), (("*.0.mlp.*", (0.0, 1.0)),), True, density=0.4, scale=0.8, seed=5)
    merge_folders(inputs, tmp_path / "same", base, recipe)
    assert content(tmp_path / "out") == content(tmp_path / "same")
    merge_folders(inputs, tmp_path / "other", base, Recipe("dare_linear", (0.7, 0.6), density=0.4, scale=0.8, seed=5))
    assert content(tmp_path / "out") != content(tmp_path / "other")


def test_report_of_an_unchanged_model_has_no_directions(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 1)
    merge_folders([base, *inputs], tmp_path / "out", base, report=tmp_path / "merge.json")
    facts = json.loads((tmp_path / "merge.json").read_text())["tensors"]["lm_head.weight"]
    assert facts["distance"][0] == 0.0
    assert facts["cosine"] == {"1-2": None}


MEMORY = """
import resource, sys
from pathlib import Path
from copd_megatron.weights.merge.folders import merge_folders
small, large, out = map(Path, sys.argv[1:])
merge_folders([small, small], out / "small", small)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge_folders([large, large], out / "large", large)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    base, _ = family(tmp_path, 0, torch.bfloat16)
    large = tmp_path / "source"
    large.mkdir()
    (large / "config.json").write_bytes((base / "config.json").read_bytes())
    forms = {f"t{number}": Form(torch.bfloat16, (50, 2**20)) for number in range(6)}
    writer = TensorWriter(large / "model.safetensors", forms)
    part = torch.randn(2**20).bfloat16()
    for name in forms:
        for row in range(50):
            writer.write(name, row * 2**20, part)
    writer.close(sync=False)
    assert (large / "model.safetensors").stat().st_size > 600e6
    command = [sys.executable, "-c", MEMORY, *map(str, (base, large, tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    before, growth = map(int, done.stdout.split())
    assert growth < 50_000, f"{growth} KiB on top of {before}"
    for folder in ("source", "large"):
        (tmp_path / folder / "model.safetensors").unlink()
