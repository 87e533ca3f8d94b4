"""What is converted row by row is what megatron-core would save of the built model; any sizes come back bit by bit."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from copd_megatron.policy import checkpoint
from copd_megatron.policy.qwen3_vl import build_model
from copd_megatron.weights import mapping
from copd_megatron.weights.convert import to_hf, to_megatron
from copd_megatron.weights.hf import HfFolder

sys.path.append(str(Path(__file__).parents[1] / "policy"))
from tiny_qwen3_vl import alone, config, moe_config, reference

MODELS = {
    "tied": config(tied=True),
    "untied": config(tied=False, deepstack=(0, 1)),
    "experts": moe_config(),
    "mixed": moe_config(dense=[2]),
}


def saved_whole(hf_dir: Path, folder: Path) -> None:
    """The checkpoint of the model, built and loaded in this process."""
    folder.mkdir()
    with alone() as layout:
        models = build_model(hf_dir, layout, "bf16")
        mapping.to_megatron(dict(HfFolder(hf_dir).tensors()), models)
        checkpoint.write_tensors({"model": models[0].sharded_state_dict()}, folder)


def content(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, Any]]:
    """Of a checkpoint: what its index says of each entry, and the values of tensors and objects."""
    described, values = {}, {}
    index = FileSystemReader(folder).read_metadata()
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            parts = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks)
            described[name] = tuple(entry.size), entry.properties, parts
            values[name] = torch.zeros(entry.size, dtype=entry.properties.dtype)
        else:
            described[name] = type(entry)
    torch_checkpoint.load(values, storage_reader=FileSystemReader(folder), no_dist=True)
    objects = {name: entry for name, entry in described.items() if isinstance(entry, type)}
    torch_checkpoint.load(objects, storage_reader=FileSystemReader(folder), no_dist=True)
    return described, values, objects


@pytest.mark.parametrize("kind", MODELS)
def test_entries_are_those_of_the_whole_model(kind: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    reference(MODELS[kind]).to(torch.bfloat16).save_pretrained(base)
    saved_whole(base, tmp_path / "whole")
    to_megatron(base, tmp_path / "streamed")
    expected, values, objects = content(tmp_path / "whole")
    found, streamed, streamed_objects = content(tmp_path / "streamed")
    assert found == expected
    assert all(torch.equal(streamed[name], values[name]) for name in values)
    assert all(value.abs().sum() > 0 for value in values.values())
    assert streamed_objects == objects
    assert set(map(str, objects.values())) == {"[None]"}
    for name in ("metadata.json", "common.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "streamed" / name).read_bytes()


def odd_model(seed: int) -> Any:
    """A model whose sizes have little in common."""
    import transformers

    draw = random.Random(seed)
    experts = seed % 3 == 2
    groups, layers = draw.choice([1, 2, 3]), draw.choice([1, 2, 3, 5])
    hidden = draw.choice([17, 22, 35])
    sparse = {
        "num_experts": draw.choice([2, 3, 5]),
        "num_experts_per_tok": 2,
        "moe_intermediate_size": draw.choice([7, 13]),
        "mlp_only_layers": [0] if layers > 1 and draw.random() < 0.5 else [],
    }
    kind = "Qwen3VLMoe" if experts else "Qwen3VL"
    form = getattr(transformers, f"{kind}Config")(
        text_config={
            **(sparse if experts else {}),
            "vocab_size": draw.choice([41, 53, 64]),
            "hidden_size": hidden,
            "intermediate_size": draw.choice([15, 27, 48]),
            "num_hidden_layers": layers,
            "num_attention_heads": groups * draw.choice([1, 2, 5]),
            "num_key_value_heads": groups,
            "head_dim": 6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 1],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": draw.choice([1, 3]),
            "hidden_size": 20,
            "intermediate_size": draw.choice([9, 21]),
            "num_heads": 5,
            "patch_size": draw.choice([2, 3]),
            "out_hidden_size": hidden,
            "num_position_embeddings": draw.choice([4, 9, 25]),
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=seed % 3 == 0,
    )
    return reference(form, seed)


@pytest.mark.parametrize("seed", range(9))
def test_any_sizes_come_back_bit_by_bit(seed: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = odd_model(seed).to(torch.float32 if seed % 2 else torch.bfloat16)
    model.save_pretrained(base)
    to_megatron(base, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "again", max_shard_bytes=3000)
    before, after = HfFolder(base), HfFolder(tmp_path / "again")
    assert after.names() == before.names()
    assert ("lm_head.weight" in before.names()) == (seed % 3 != 0)
    for name in before.names():
        assert after.dtype(name) == before.dtype(name), name
        assert torch.equal(after.tensor(name), before.tensor(name)), name


def test_exported_folder_opens_in_transformers(tmp_path: Path) -> None:
    import transformers

    model = odd_model(0)
    model.save_pretrained(tmp_path / "base")
    to_megatron(tmp_path / "base", tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "again", max_shard_bytes=3000)
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "again", local_files_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
