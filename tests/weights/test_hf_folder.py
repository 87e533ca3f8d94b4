"""Hugging Face folders are read and written bit by bit as they are, and whatever is wrong with one is named."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from copd_megatron.errors import WeightsError
from copd_megatron.weights import hf
from copd_megatron.weights.hf import HfFolder, write_folder


def _content(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor's format, shape and bytes."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in HfFolder(folder).tensors()
    }


def _base(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "none"}')
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 20_000])
def test_copy_is_bit_exact_with_all_model_files(
    save_model: Callable[..., Path], tmp_path: Path, dtype: torch.dtype, shard_bytes: int
) -> None:
    base = save_model(0, dtype)
    write_folder(tmp_path / "copy", HfFolder(base).tensors(), base, max_shard_bytes=shard_bytes)
    assert _content(tmp_path / "copy") == _content(base)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "copy" / name).read_bytes() == (base / name).read_bytes()


def test_shards_stay_within_the_limit_and_are_numbered(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0)
    limit = 40_000
    assert max(tensor.nbytes for _, tensor in HfFolder(base).tensors()) < limit
    write_folder(tmp_path / "copy", HfFolder(base).tensors(), base, max_shard_bytes=limit)
    shards = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert sum(file.get_tensor(name).nbytes for name in file.keys()) <= limit  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in HfFolder(base).tensors())


def test_transformers_loads_a_sharded_folder(
    save_model: Callable[..., Path], build_model: Callable[[int], torch.nn.Module], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    base = save_model(3)
    write_folder(tmp_path / "copy", HfFolder(base).tensors(), base, max_shard_bytes=20_000)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "copy").state_dict()
    expected = build_model(3).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_no_more_than_one_shard_is_taken_ahead(tmp_path: Path) -> None:
    base, taken = _base(tmp_path / "base"), []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for number in range(6):
            finished = [*tmp_path.glob(".out.*/*.safetensors")]
            taken.append(len(finished))
            yield f"t{number}", torch.zeros(100)

    write_folder(tmp_path / "out", tensors(), base, max_shard_bytes=800)
    assert taken == [0, 0, 0, 1, 1, 2]


def test_shape_and_format_are_known(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    write_folder(tmp_path / "out", [("b", torch.zeros(2, 3, dtype=torch.bfloat16)), ("a", torch.ones(4))], base)
    folder = HfFolder(tmp_path / "out")
    assert folder.names() == ["a", "b"]
    assert folder.shape("b") == (2, 3)
    assert folder.dtype("b") == torch.bfloat16
    assert folder.config == {"model_type": "none"}


def test_tied_and_transposed_tensors_are_written_in_full(tmp_path: Path) -> None:
    base, weight = _base(tmp_path / "base"), torch.arange(6.0).reshape(2, 3)
    write_folder(tmp_path / "out", [("a", weight), ("tied", weight), ("turned", weight.T), ("part", weight[1:])], base)
    folder = HfFolder(tmp_path / "out")
    assert torch.equal(folder.tensor("tied"), weight)
    assert torch.equal(folder.tensor("turned"), weight.T)
    assert torch.equal(folder.tensor("part"), weight[1:])


def test_code_and_foreign_files_are_not_copied(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    (base / "modeling.py").write_text("raise SystemExit")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    write_folder(tmp_path / "out", [("a", torch.ones(1))], base)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_content_is_overwritten_only_if_allowed(tmp_path: Path) -> None:
    base, out = _base(tmp_path / "base"), tmp_path / "out"
    write_folder(out, [("a", torch.ones(1)), ("b", torch.ones(1))], base, max_shard_bytes=4)
    with pytest.raises(WeightsError, match="is not empty"):
        write_folder(out, [("a", torch.zeros(1))], base)
    assert HfFolder(out).names() == ["a", "b"]
    write_folder(out, [("a", torch.zeros(1))], base, overwrite=True)
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path: Path) -> None:
    base, photos = _base(tmp_path / "base"), tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.png").touch()
    with pytest.raises(WeightsError, match=r"has no config\.json"):
        write_folder(photos, [("a", torch.ones(1))], base, overwrite=True)
    assert os.listdir(photos) == ["cat.png"]


def test_failure_half_way_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = _base(tmp_path / "base"), tmp_path / "out"
    write_folder(out, [("a", torch.ones(1))], base)
    real = hf.save_file

    def disk_full(shard: dict[str, torch.Tensor], path: Path, **rest: object) -> None:
        if path.name.startswith("model-00002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(shard, path, **rest)

    monkeypatch.setattr(hf, "save_file", disk_full)
    with pytest.raises(WeightsError, match="No space left on device"):
        write_folder(out, [("b", torch.ones(1)), ("c", torch.ones(1))], base, max_shard_bytes=4, overwrite=True)
    assert HfFolder(out).names() == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_failed_exchange_of_folders_brings_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = _base(tmp_path / "base"), tmp_path / "out"
    write_folder(out, [("a", torch.ones(1))], base)
    real = Path.rename

    def refuse_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(WeightsError, match="Input/output error"):
        write_folder(out, [("b", torch.ones(1))], base, overwrite=True)
    assert HfFolder(out).names() == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["base", "out"]


def test_missing_folder_and_config_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="absent: no such folder"):
        HfFolder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"config\.json: is missing"):
        HfFolder(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not valid JSON"):
        HfFolder(tmp_path / "empty")


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    torch.save({"a": torch.ones(1)}, base / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        HfFolder(base)


def test_missing_weights_and_index_are_named(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    with pytest.raises(WeightsError, match="no weights here"):
        HfFolder(base)
    save_file({"a": torch.ones(1)}, base / "model-00001-of-00002.safetensors")
    with pytest.raises(WeightsError, match="the index is missing"):
        HfFolder(base)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = [("a", torch.ones(100)), ("b", torch.ones(100))]
    write_folder(tmp_path / "sharded", tensors, _base(tmp_path / "base"), max_shard_bytes=400)
    return tmp_path / "sharded"


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors: is missing"):
        HfFolder(sharded)


@pytest.mark.parametrize("kept", [0, 5, 50, 300])
def test_cut_shard_is_named(sharded: Path, kept: int) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model-00002-of-00002\.safetensors: is damaged or cut short"):
        HfFolder(sharded)


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ({"a": "model-00002-of-00002.safetensors"}, "tensor a is missing"),
        ({"c": "model-00001-of-00002.safetensors"}, "tensor c is missing"),
        ({"a": "../sharded/model-00001-of-00002.safetensors"}, "outside the folder"),
        ({}, "expected a `weight_map`"),
        ([], "expected a `weight_map`"),
    ],
)
def test_wrong_index_is_refused(sharded: Path, weight_map: object, complaint: str) -> None:
    (sharded / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=complaint):
        HfFolder(sharded)


def test_tensor_that_the_index_omits_is_named(sharded: Path) -> None:
    save_file({"b": torch.ones(1), "extra": torch.ones(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match="does not list tensors that the files hold: extra"):
        HfFolder(sharded)


def test_unknown_tensor_suggests_the_nearest(sharded: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "out", [("lm_head.weight", torch.ones(1))], sharded)
    with pytest.raises(WeightsError, match=r"no tensor lm_head\.wieght; did you mean lm_head\.weight\?"):
        HfFolder(tmp_path / "out").tensor("lm_head.wieght")


def test_repeated_or_absent_tensors_are_refused(tmp_path: Path) -> None:
    base = _base(tmp_path / "base")
    with pytest.raises(WeightsError, match="tensor a was given twice"):
        write_folder(tmp_path / "out", [("a", torch.ones(1)), ("a", torch.ones(1))], base, max_shard_bytes=4)
    with pytest.raises(WeightsError, match="no tensors to write"):
        write_folder(tmp_path / "out", [], base)
    assert not (tmp_path / "out").exists()
