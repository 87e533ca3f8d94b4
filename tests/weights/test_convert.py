"""Hugging Face folder to Megatron checkpoint and back gives every byte again."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from copd_megatron.cli import app
from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.policy import checkpoint
from copd_megatron.policy.layout import Layout, initialize, shutdown
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.policy.qwen3_vl.config import Precision
from copd_megatron.policy.trainer import Policy
from copd_megatron.weights import megatron_writer
from copd_megatron.weights.convert import layout_of, to_hf, to_megatron
from copd_megatron.weights.crew import ALONE, Crew
from copd_megatron.weights.hf import HfFolder, write_folder
from copd_megatron.weights.hf_shards import forms_of, plan_shards, write_shards
from copd_megatron.weights.progress import Progress


def _content(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in HfFolder(folder).tensors()
    }


@pytest.fixture
def converted(save_model: Callable[..., Path], tmp_path: Path) -> Path:
    to_megatron(save_model(0), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(("dtype", "experts"), [(torch.float32, 0), (torch.bfloat16, 0), (torch.float32, 3)])
def test_round_trip_is_bit_exact(
    save_model: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, experts: int
) -> None:
    base = save_model(0, dtype, experts)
    to_megatron(base, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "again", max_shard_bytes=20_000)
    assert _content(tmp_path / "again") == _content(base)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()


def test_any_other_base_of_the_same_shape_can_give_the_form(
    converted: Path, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    other = save_model(1)
    (other / "chat_template.jinja").write_text("another")
    to_hf(converted, tmp_path / "again", base=other)
    assert _content(tmp_path / "again") == _content(tmp_path / "model0")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "another"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpoint_of_a_run_gives_the_weights_it_holds(
    save_model: Callable[..., Path], tmp_path: Path, precision: Precision
) -> None:
    base = save_model(0, torch.float32 if precision == "fp32" else torch.bfloat16)
    initialize(Layout())
    policy = Policy(base, Layout(), OptimizerSettings(distributed=True), precision, max_tokens_per_microbatch=64)
    for parameter in policy.model.parameters():
        parameter.data.mul_(1.5)
        parameter.main_grad.fill_(1.0)
    policy.optimizer.step()
    trained = {name: tensor.clone() for name, tensor in policy.named_weights()}
    checkpoint.save(policy, tmp_path / "step_0000001", state={})
    shutdown()
    to_hf(tmp_path / "step_0000001", tmp_path / "again", base=base)
    again = dict(HfFolder(tmp_path / "again").tensors())
    assert again.keys() == trained.keys() == dict(HfFolder(base).tensors()).keys()
    assert all(torch.equal(again[name], trained[name]) and again[name].dtype == trained[name].dtype for name in trained)


def test_output_with_content_is_refused_before_work_is_done(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("copd_megatron.weights.convert.MegatronSource")
    with pytest.raises(WeightsError, match="is not empty"):
        to_hf(converted, tmp_path / "model0")
    monkeypatch.delattr("copd_megatron.weights.convert.HfFolder")
    with pytest.raises(WeightsError, match="is not empty"):
        to_megatron(tmp_path / "model0", converted)


def test_checkpoint_is_overwritten_only_if_allowed(converted: Path, save_model: Callable[..., Path]) -> None:
    newer = save_model(1)
    with pytest.raises(WeightsError, match="is not empty"):
        to_megatron(newer, converted)
    to_megatron(newer, converted, overwrite=True)
    to_hf(converted, converted.with_name("again"))
    assert _content(converted.with_name("again")) == _content(newer)


@pytest.mark.parametrize("formats", [(torch.float16, torch.float16), (torch.float32, torch.bfloat16)])
def test_formats_that_would_not_come_back_are_refused(
    save_model: Callable[..., Path], tmp_path: Path, formats: tuple[torch.dtype, torch.dtype]
) -> None:
    base = save_model(0)
    tensors = [(name, tensor.to(formats[i % 2])) for i, (name, tensor) in enumerate(HfFolder(base).tensors())]
    write_folder(tmp_path / "other", tensors, base)
    with pytest.raises(WeightsError, match="expected all of them to be"):
        to_megatron(tmp_path / "other", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_weights_of_another_model_are_refused(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0)
    kept = [pair for pair in HfFolder(base).tensors() if "layers.1.mlp.down_proj" not in pair[0]]
    write_folder(tmp_path / "other", kept, base)
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.down_proj"):
        to_megatron(tmp_path / "other", tmp_path / "checkpoint")
    assert sorted(os.listdir(tmp_path)) == ["model0", "other"]


def test_failed_write_leaves_the_old_checkpoint(converted: Path, save_model: Callable[..., Path]) -> None:
    newer, before = save_model(1), {file.name: file.read_bytes() for file in converted.iterdir() if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WeightsError, match=r"could not be written \(.*File too large"):
            to_megatron(newer, converted, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in converted.iterdir() if file.is_file()} == before
    assert sorted(os.listdir(converted.parent)) == ["checkpoint", "model0", "model1"]


def test_what_is_no_checkpoint_is_named(tmp_path: Path, save_model: Callable[..., Path]) -> None:
    with pytest.raises(WeightsError, match="not a complete Megatron checkpoint"):
        to_hf(save_model(0), tmp_path / "out")


def test_checkpoint_without_hugging_face_files_needs_a_base(converted: Path, tmp_path: Path) -> None:
    (converted / "hf").rename(tmp_path / "form")
    with pytest.raises(WeightsError, match="has no hf/ folder"):
        to_hf(converted, tmp_path / "out")
    to_hf(converted, tmp_path / "out", base=tmp_path / "form")
    assert _content(tmp_path / "out") == _content(tmp_path / "model0")


def test_base_of_another_size_is_refused(converted: Path, tmp_path: Path) -> None:
    config = json.loads((converted / "hf" / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (converted / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"not of the model that config\.json describes: .*gate_proj.*\[48, 32\]"):
        to_hf(converted, tmp_path / "out")


def test_too_little_disk_is_told_before_anything_is_written(
    converted: Path, save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = save_model(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    for convert in (
        lambda: to_hf(converted, tmp_path / "out"),
        lambda: to_megatron(newer, tmp_path / "out"),
    ):
        with pytest.raises(WeightsError, match=r"67\.\d MB are needed, .* has 1\.0 MB left"):
            convert()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "model0", "model1"]


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        ({"tp": 3}, "parallel.tp = 3 does not divide text_config.num_attention_heads = 4"),
        ({"tp": 4}, "parallel.tp = 4 does not divide text_config.num_key_value_heads = 2"),
        ({"pp": 2, "vpp": 2}, "pp × vpp = 2 × 2 does not divide text_config.num_hidden_layers = 2"),
        ({"ep": 2}, "parallel.ep = 2 divides experts, and a 'qwen3_vl' has none"),
    ],
)
def test_layout_that_does_not_divide_the_model_is_refused(
    save_model: Callable[..., Path], tmp_path: Path, degrees: dict[str, int], reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        to_megatron(save_model(0), tmp_path / "out", layout=layout_of(**degrees))
    assert not (tmp_path / "out").exists()


def test_layout_that_divides_the_model_makes_no_difference(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0, experts=4)
    to_megatron(base, tmp_path / "one")
    to_megatron(base, tmp_path / "many", layout=layout_of(tp=2, pp=2, ep=2))
    for file in (tmp_path / "one").glob("*.distcp"):
        assert file.read_bytes() == (tmp_path / "many" / file.name).read_bytes()


def test_heads_that_cannot_share_keys_are_refused(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0)
    config = json.loads((base / "config.json").read_text())
    config["text_config"] |= {"num_attention_heads": 5}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="5 attention heads cannot share 2 keys and values"):
        to_megatron(base, tmp_path / "out")


def test_command_line_converts_both_ways(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0)
    for arguments in (
        ["to-megatron", str(base), str(tmp_path / "checkpoint"), "--tp", "2"],
        ["to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "again")],
    ):
        result = CliRunner().invoke(app, ["convert", *arguments])
        assert result.exit_code == 0, result.output
    assert _content(tmp_path / "again") == _content(base)
    refused = CliRunner().invoke(app, ["convert", "to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "again")])
    assert isinstance(refused.exception, WeightsError)
    CliRunner().invoke(app, ["convert", "to-hf", str(tmp_path / "checkpoint"), str(tmp_path / "again"), "--overwrite"])
    assert _content(tmp_path / "again") == _content(base)


def test_progress_tells_speed_and_time_left_without_a_terminal(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 10.0, 31.0, 40.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    with caplog.at_level(logging.INFO), Progress("converting", 10_000_000, ALONE) as progress:
        progress.done(1_000_000)
        progress.done(5_200_000)
        progress.done(1)
    assert caplog.messages == ["converting: 6.2 MB of 10.0 MB, 200.0 kB/s, 19 s left"]


def test_progress_is_a_bar_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Progress("converting", 10_000_000, Crew(0, 4), console) as progress:
        progress.done(5_000_000)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "converting, process 1 of 4" in shown
    assert "5.0/10.0 MB" in shown


class Mixed:
    """A norm of three numbers in bfloat16 before and behind a matrix in float32."""

    tensors: ClassVar = {
        "a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16),
        "b": torch.arange(6.0).view(3, 2).t(),
        "c": torch.tensor([4.0], dtype=torch.bfloat16),
    }

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def test_tensors_of_several_formats_are_written_where_they_can_be_mapped(tmp_path: Path) -> None:
    written: list[int] = []
    write_shards(Mixed(), plan_shards(forms_of(Mixed()), 100), tmp_path, ALONE, written.append)
    content = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 8 == 0
    assert header["b"]["data_offsets"][0] % 4 == 0
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in Mixed.tensors.items())
    assert sum(written) == 32 == len(content) - start


def test_large_checkpoints_lie_in_several_files(
    save_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron_writer, "FILE_BYTES", 30_000)
    monkeypatch.setattr(megatron_writer, "MAPPED_BYTES", 3_000)
    base = save_model(0)
    to_megatron(base, tmp_path / "checkpoint")
    assert len(list((tmp_path / "checkpoint").glob("__0_*.distcp"))) > 2
    to_hf(tmp_path / "checkpoint", tmp_path / "again")
    assert _content(tmp_path / "again") == _content(base)


def test_shards_are_filled_in_order_up_to_their_limit() -> None:
    def planned(limit: int) -> list[str]:
        return [f"{shard.file}: {' '.join(shard.forms)}" for shard in plan_shards(forms_of(Mixed()), limit)]

    assert planned(30) == ["model-00001-of-00002.safetensors: a b", "model-00002-of-00002.safetensors: c"]
    assert planned(32) == ["model.safetensors: a b c"]
    assert [line[-1] for line in planned(1)] == ["a", "b", "c"]


def test_shares_are_neighbours_of_about_equal_size() -> None:
    sizes = [3, 1, 1, 1, 9, 1, 1, 1, 0]
    shares = [Crew(rank, 3).share(sizes) for rank in range(3)]
    assert [number for share in shares for number in share] == list(range(len(sizes)))
    assert [sum(sizes[number] for number in share) for share in shares] == [6, 9, 3]
    assert [len(Crew(rank, 4).share([5])) for rank in range(4)].count(1) == 1
