"""Folders of every family other than Qwen3-VL become checkpoints and folders again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_qwen2_5_vl
import torch
from safetensors.torch import load_file
from tiny_qwen3_text import dense, sparse
from tiny_qwen3_vl import alone, reference

from copd_megatron.errors import WeightsError
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.weights import convert

MODELS = {
    "qwen3": dense(),
    "qwen3, untied": dense(tied=False),
    "qwen3_moe": sparse(),
    "qwen3_moe, one dense layer": sparse([1], tied=True),
    "qwen2_5_vl": tiny_qwen2_5_vl.config(),
    "qwen2_5_vl, tied": tiny_qwen2_5_vl.config(tied=True),
}


@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
def test_every_byte_comes_back(tmp_path: Path, hf_config: Any) -> None:
    reference(hf_config).save_pretrained(tmp_path / "theirs")

    convert.to_megatron(tmp_path / "theirs", tmp_path / "megatron")
    convert.to_hf(tmp_path / "megatron", tmp_path / "ours")

    theirs, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("hf_config", MODELS.values(), ids=MODELS)
def test_shapes_are_held_to_the_configuration(tmp_path: Path, hf_config: Any) -> None:
    reference(hf_config).save_pretrained(tmp_path / "model")
    described = json.loads((tmp_path / "model" / "config.json").read_text())
    sizes = described.get("text_config", described)
    sizes["vocab_size"] += 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(described))

    with pytest.raises(WeightsError, match=r"embed_tokens\.weight is \[.*config\.json says \["):
        convert.to_megatron(tmp_path / "model", tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()


@pytest.fixture
def policies(tmp_path: Path) -> Iterator[Any]:
    """Builds a policy of a configuration and a seed of its weights."""
    from copd_megatron.policy.trainer import Policy

    with alone() as layout:

        def build(hf_config: Any, seed: int) -> Any:
            folder = tmp_path / f"{hf_config.model_type}{seed}"
            reference(hf_config, seed).save_pretrained(folder)
            return Policy(folder, layout, OptimizerSettings(), "fp32", 1000)

        yield build


@pytest.mark.parametrize(
    "hf_config", [dense(), sparse([1]), tiny_qwen2_5_vl.config()], ids=lambda each: each.model_type
)
def test_training_checkpoints_are_taken_back_by_the_same_model_alone(
    tmp_path: Path, policies: Any, hf_config: Any
) -> None:
    from copd_megatron.policy import checkpoint

    saved, other = policies(hf_config, 0), policies(hf_config, 1)

    checkpoint.save(saved, tmp_path / "step_1", {"step": 1})
    assert checkpoint.load(other, tmp_path / "step_1") == [{"step": 1}]

    expected = dict(saved.named_weights())
    for name, tensor in other.named_weights():
        assert torch.equal(tensor, expected[name]), name
    larger = hf_config.to_dict()
    sizes = larger.get("text_config", larger)
    sizes["intermediate_size"] += 2
    with pytest.raises(WeightsError, match=r"intermediate_size"):
        checkpoint.load(policies(type(hf_config).from_dict(larger), 2), tmp_path / "step_1")
