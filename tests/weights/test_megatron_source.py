"""The tensors of a distributed checkpoint are read one by one, and only from what may be trusted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from copd_megatron.errors import WeightsError
from copd_megatron.policy.manifest import MANIFEST, describe, read_manifest, write_manifest
from copd_megatron.weights.convert import to_hf, to_megatron
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.megatron_source import MegatronSource

EMBEDDING = "model.language_model.embed_tokens.weight"
QUERY, KEY = (f"model.language_model.layers.1.self_attn.{part}_proj.weight" for part in "qk")


@pytest.fixture(scope="module")
def original(build_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    build_model(0, 3).save_pretrained(folder)
    to_megatron(folder, folder.with_name("checkpoint"))
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(original.with_name("checkpoint"), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def rewritten(checkpoint: Path, change: Callable[[Any], None]) -> None:
    """Change the checkpoint's index, and its manifest with it."""
    index = FileSystemReader(checkpoint).read_metadata()
    change(index)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    files = read_manifest_of(checkpoint)
    write_manifest(checkpoint, {**files, ".metadata": describe(checkpoint / ".metadata")})


def read_manifest_of(checkpoint: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return files


def test_every_tensor_is_that_of_the_hugging_face_folder(original: Path) -> None:
    folder, source = HfFolder(original), MegatronSource(original.with_name("checkpoint"))
    assert sorted(source.names()) == folder.names()
    assert source.config == folder.config
    for name in folder.names():
        assert source.shape(name) == folder.shape(name), name
        assert source.dtype(name) == folder.dtype(name), name
        assert torch.equal(source.tensor(name), folder.tensor(name)), name


def test_shapes_and_formats_need_no_data(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MegatronSource(original.with_name("checkpoint"))
    monkeypatch.setattr(FileSystemReader, "read_data", None)
    assert [source.shape(name) for name in source.names()]
    assert {source.dtype(name) for name in source.names()} == {torch.float32}
    with pytest.raises(WeightsError, match="cannot be read"):
        source.tensor(EMBEDDING)


def test_a_row_is_read_once_and_nothing_but_it(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MegatronSource(original.with_name("checkpoint"))
    read: list[int] = []
    whole = FileSystemReader.read_data

    def counted(self: Any, plan: Any, planner: Any) -> Any:
        read.append(sum(item.lengths.numel() for item in plan.items))
        return whole(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", counted)
    query, key = source.tensor(QUERY), source.tensor(KEY)
    assert read == [query.numel() + 2 * key.numel()]  # of layer 1, and not of layer 0 that is stacked on it
    source.tensor(EMBEDDING)
    assert torch.equal(source.tensor(QUERY), query)
    assert len(read) == 3


def test_unknown_name_gets_a_hint(original: Path) -> None:
    with pytest.raises(WeightsError, match=r"did you mean model\.language_model\.embed_tokens\.weight"):
        MegatronSource(original.with_name("checkpoint")).tensor("model.language_model.embed_token.weight")


# ---------------------------------------------------------------------- trust


class Bomb:
    """What a forged index could hold."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(Bomb.crater),)

    crater = Path("unset")


@pytest.mark.parametrize("manifest", ["none", "another's"])
def test_pickled_index_is_not_read_without_a_manifest_that_fits(
    checkpoint: Path, tmp_path: Path, manifest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bomb, "crater", tmp_path / "crater")
    size = (checkpoint / ".metadata").stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Bomb()).ljust(size, b"\0"))
    reason = "differs from its checksum"
    if manifest == "none":
        (checkpoint / MANIFEST).unlink()
        reason = f"there is no {MANIFEST}"
    with pytest.raises(WeightsError, match=rf"{reason}.*add --trust"):
        MegatronSource(checkpoint)
    assert not Bomb.crater.exists()
    with pytest.raises(WeightsError):
        MegatronSource(checkpoint, trust=True)
    assert Bomb.crater.exists()  # which shows that the bomb is one


def test_checkpoint_without_manifest_is_read_with_trust(checkpoint: Path, original: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    assert torch.equal(MegatronSource(checkpoint, trust=True).tensor(EMBEDDING), HfFolder(original).tensor(EMBEDDING))


def test_manifest_must_name_the_index(checkpoint: Path) -> None:
    files = read_manifest_of(checkpoint)
    del files[".metadata"]
    write_manifest(checkpoint, files)
    with pytest.raises(WeightsError, match=r"does not list \.metadata"):
        MegatronSource(checkpoint)


def test_manifest_lists_what_was_written(checkpoint: Path) -> None:
    files = read_manifest(checkpoint)
    assert files is not None
    assert set(files) == {file.name for file in checkpoint.iterdir() if file.is_file()} - {MANIFEST}
    assert all(describe(checkpoint / name) == entry for name, entry in files.items())


# ---------------------------------------------------------------------- damage


def test_one_changed_byte_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    part = next(checkpoint.glob("*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"{part.name} differs from its checksum"):
        to_hf(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cut_file_is_noticed_with_or_without_a_manifest(checkpoint: Path, tmp_path: Path) -> None:
    part = next(checkpoint.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=rf"{part.name} has 1000 bytes"):
        to_hf(checkpoint, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"cannot be read .* it is damaged"):
        to_hf(checkpoint, tmp_path / "out", trust=True)
    assert not (tmp_path / "out").exists()


def test_missing_file_is_named(checkpoint: Path) -> None:
    part = next(checkpoint.glob("*.distcp"))
    part.unlink()
    with pytest.raises(WeightsError, match=rf"{part.name} is missing"):
        MegatronSource(checkpoint)
    with pytest.raises(WeightsError, match=rf"incomplete, it lacks the files {part.name}"):
        MegatronSource(checkpoint, trust=True)


def test_missing_part_of_a_tensor_is_noticed(checkpoint: Path) -> None:
    """What is not there must not be whatever the memory held."""
    rewritten(checkpoint, lambda index: index.state_dict_metadata["decoder.layers.mlp.router.weight"].chunks.pop())
    source = MegatronSource(checkpoint)
    with pytest.raises(WeightsError, match=r"only a part of decoder\.layers\.mlp\.router\.weight"):
        source.tensor("model.language_model.layers.1.mlp.gate.weight")


def test_missing_tensor_is_named(checkpoint: Path) -> None:
    rewritten(checkpoint, lambda index: index.state_dict_metadata.pop("decoder.final_layernorm.weight"))
    with pytest.raises(WeightsError, match=r"lacks decoder\.final_layernorm\.weight"):
        MegatronSource(checkpoint)


def test_tensor_that_the_model_has_no_place_for_is_named(checkpoint: Path) -> None:
    def add(index: Any) -> None:
        entries = index.state_dict_metadata
        entries["decoder.another.weight"] = entries["decoder.final_layernorm.weight"]
        entries["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = entries["decoder.final_layernorm.weight"]

    rewritten(checkpoint, add)
    with pytest.raises(WeightsError, match=r"no place for decoder\.another\.weight;"):
        MegatronSource(checkpoint)


def test_files_outside_the_folder_are_refused(checkpoint: Path) -> None:
    def point_away(index: Any) -> None:
        next(iter(index.storage_data.values())).relative_path = "../elsewhere.distcp"

    rewritten(checkpoint, point_away)
    with pytest.raises(WeightsError, match=r"names files outside the folder: \.\./elsewhere\.distcp"):
        MegatronSource(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("num_hidden_layers", 3, "has 2 layers of decoder.layers.*, not 3"),
        ("hidden_size", 40, r"embed_tokens.weight is \[40, 32\], .* says \[40, 40\]"),
        ("vocab_size", 44, r"embed_tokens.weight is \[40, 32\], .* says \[44, 32\]"),
        ("moe_intermediate_size", 20, r"gate_up_proj is \[3, 32, 24\], .* says \[3, 32, 40\]"),
        ("num_local_experts", 4, r"gate.weight is \[3, 32\], .* says \[4, 32\]"),
        ("mlp_only_layers", [1], r"lacks .*decoder\.layers\.0\."),
    ],
)
def test_configuration_of_another_model_is_refused(checkpoint: Path, key: str, value: Any, reason: str) -> None:
    config = json.loads((checkpoint / "hf" / "config.json").read_text())
    config["text_config"][key] = value
    (checkpoint / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=reason):
        MegatronSource(checkpoint)


def test_other_kinds_of_checkpoints_are_refused(checkpoint: Path) -> None:
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(WeightsError, match="is saved as 'zarr'"):
        MegatronSource(checkpoint)
