"""Several processes convert as one does; what is interrupted or fails leaves nothing; memory does not grow with the
model."""

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

from copd_megatron.errors import WeightsError
from copd_megatron.weights import convert, hf_shards, megatron_writer
from copd_megatron.weights.crew import ALONE, started_crew
from copd_megatron.weights.form import ModelForm
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.progress import Progress

sys.path.append(str(Path(__file__).parents[1] / "policy"))
import gang

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
COMMAND = ["-m", "copd_megatron.cli", "convert"]


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file in a folder and below."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.slow
def test_two_processes_write_what_one_does(save_model: Callable[..., Path], tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    base = save_model(0, torch.bfloat16, 3)
    convert.to_megatron(base, tmp_path / "one")
    convert.to_hf(tmp_path / "one", tmp_path / "one_hf", max_shard_bytes=20_000)

    def run(*arguments: str) -> None:
        subprocess.run([sys.executable, *torchrun, *COMMAND, *arguments], env=ENVIRONMENT, check=True, timeout=240)

    run("to-megatron", str(base), str(tmp_path / "two"))
    assert {file.name for file in (tmp_path / "two").glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    convert.to_hf(tmp_path / "two", tmp_path / "two_hf", max_shard_bytes=20_000)
    assert files(tmp_path / "two_hf") == files(tmp_path / "one_hf")

    script = "import sys; from copd_megatron import cli; from copd_megatron.weights import convert; "
    script += "whole = convert.to_hf; convert.to_hf = lambda *a: whole(*a[:4], 20_000, *a[5:]); cli.main()"
    (tmp_path / "small_shards.py").write_text(script)
    small = [sys.executable, *torchrun, str(tmp_path / "small_shards.py"), "convert", "to-hf"]
    subprocess.run([*small, str(tmp_path / "two"), str(tmp_path / "by_two")], env=ENVIRONMENT, check=True, timeout=240)
    assert len(files(tmp_path / "by_two")) > 5
    assert files(tmp_path / "by_two") == files(tmp_path / "one_hf")


def fail_on_one(base: Path, checkpoint: Path, root: Path) -> list[str]:
    """The second process cannot read a tensor; what this one is told, in both directions."""
    told = []
    with started_crew() as crew:
        if crew.rank == 1:

            def unreadable(self: Any, name: str) -> torch.Tensor:
                raise OSError(5, "Input/output error", name)

            megatron_writer._write_record = lambda record, tensors, file: unreadable(tensors, record.place.key)
            convert.MegatronSource.tensor = unreadable  # type: ignore[method-assign]
        for work in (
            lambda: convert.to_megatron(base, root / "out", crew=crew),
            lambda: convert.to_hf(checkpoint, root / "out", max_shard_bytes=20_000, crew=crew),
            lambda: convert.to_hf(root / f"absent{crew.rank}" if crew.rank else checkpoint, root / "out", crew=crew),
        ):
            try:
                work()
            except WeightsError as error:
                told.append(str(error))
    return told


@pytest.mark.slow
def test_error_of_one_process_ends_all_with_it(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0)
    convert.to_megatron(base, tmp_path / "checkpoint")
    (tmp_path / "root").mkdir()
    for rank, told in enumerate(gang.run(2, fail_on_one, base, tmp_path / "checkpoint", tmp_path / "root")):
        assert len(told) == 3
        whose = "" if rank == 1 else "process 1: "
        assert all(f"out: could not be written ({whose}OSError:" in each for each in told[:2])
        assert all("OSError: [Errno 5] Input/output error" in each for each in told[:2])
        assert told[2].startswith(whose)
        assert "absent1: is not a complete Megatron checkpoint" in told[2]
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_kill_leaves_nothing_half_done(
    save_model: Callable[..., Path], tmp_path: Path, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_model(0)
    convert.to_megatron(base, tmp_path / "checkpoint")
    convert.to_hf(tmp_path / "checkpoint", tmp_path / "folder")
    source, old = (base, "checkpoint") if direction == "to-megatron" else (tmp_path / "checkpoint", "folder")
    before = files(tmp_path / old)
    left = iter(range(20, -1, -1))

    def dying(self: Progress, nbytes: int) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Progress, "done", dying)
    for out in (tmp_path / "new", tmp_path / old):
        child = os.fork()
        if child == 0:
            (convert.to_megatron if direction == "to-megatron" else convert.to_hf)(source, out, overwrite=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert list(tmp_path.glob(f".{out.name}.*.tmp/*.*"))  # it had begun
    assert not (tmp_path / "new").exists()
    assert files(tmp_path / old) == before
    monkeypatch.undo()
    for out in (tmp_path / "new", tmp_path / old):
        (convert.to_megatron if direction == "to-megatron" else convert.to_hf)(source, out, overwrite=True)
    assert not list(tmp_path.glob(".*"))


MEASURED = """
import resource, sys
from pathlib import Path
from copd_megatron.weights import convert, megatron_writer
from copd_megatron.weights.merge import folders, rows

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

root = Path(sys.argv[1])
megatron_writer.MAPPED_BYTES = rows.AHEAD_BYTES = 2**24
small, large = root / "small", root / "large"
for folder in (small, large):
    if folder is large:
        before = peak()
    convert.to_megatron(folder, folder.with_suffix(".megatron"))
    convert.to_hf(folder.with_suffix(".megatron"), folder.with_suffix(".again"), max_shard_bytes=2**28)
    inputs = [folder, folder.with_suffix(".megatron")]
    folders.merge_folders(inputs, None, folder, megatron=folder.with_suffix(".merged"))
print(peak() - before)
"""


class Random:
    """Random weights of the model that a folder's config.json describes, none of them before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._shapes = ModelForm(folder).shapes

    def names(self) -> list[str]:
        return [name for name in self._shapes if name != "lm_head.weight"]

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._shapes[name])

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> torch.Tensor:
        return torch.randn(self._shapes[name]).to(torch.bfloat16)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(save_model: Callable[..., Path], tmp_path: Path) -> None:
    form = json.loads((save_model(0) / "config.json").read_text())
    for name, layers in (("small", 2), ("large", 48)):
        form["text_config"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": layers}
        form["text_config"] |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
        form["text_config"]["rope_parameters"]["mrope_section"] = [16, 8, 8]
        form["vision_config"]["out_hidden_size"] = 512
        form["tie_word_embeddings"] = True
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(form))
        source = Random(tmp_path / name)
        shards = hf_shards.plan_shards(hf_shards.forms_of(source), 10**10)
        hf_shards.write_shards(source, shards, tmp_path / name, ALONE, lambda nbytes: None)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], env=ENVIRONMENT, timeout=240, check=True, capture_output=True
    )
    grown = int(result.stdout)
    assert size > 350e6
    assert grown < 60e6, f"converting {size / 1e6:.0f} MB took {grown / 1e6:.0f} MB more than a small model"
    convert.to_hf(tmp_path / "large.merged", tmp_path / "large.merged_again")
    again, merged, before = (HfFolder(tmp_path / f"large{which}") for which in (".again", ".merged_again", ""))
    assert all(torch.equal(again.tensor(name), before.tensor(name)) for name in before.names())
    assert all(torch.equal(merged.tensor(name), before.tensor(name)) for name in before.names())
