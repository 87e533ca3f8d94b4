"""What is asked of every family of models, with `published` names and forms where transformers has others in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_qwen3_vl import Conversation, pack, reference_logits, token_loss

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model
from copd_megatron.weights.hf import HfFolder, write_folder
from copd_megatron.weights.mapping import hf_names, to_hf, to_megatron

Named = dict[str, torch.Tensor]


def gradients_equal_transformers(
    layout: Layout,
    hf: Any,
    conversations: Sequence[Conversation],
    recompute: Any,
    published: Callable[[Named], Named] = dict,
) -> None:
    """Of `token_loss` on conversations whose responses share their prompt."""
    model = build_model(hf.config, layout, "fp32", recompute)
    to_megatron(published(hf.state_dict()), model)
    batch = pack(conversations)

    token_loss(model[0](batch), batch).backward()
    token_loss(reference_logits(hf, conversations), batch).backward()

    for parameter in model[0].parameters():
        parameter.data = parameter.grad
    wanted = published({name: parameter.grad for name, parameter in hf.named_parameters()})
    for name, ours in to_hf(model):
        theirs = wanted.pop(name)
        assert theirs.norm() > 0, name
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm(), name
    assert not wanted


def every_byte_comes_back(folder: Path, layout: Layout, hf: Any, precision: Any) -> Named:
    """What a folder that transformers saved has become after a way through the policy's model."""
    hf = hf.bfloat16() if precision == "bf16" else hf
    hf.save_pretrained(folder / "theirs")
    theirs = load_file(folder / "theirs" / "model.safetensors")

    model = build_model(folder / "theirs", layout, precision)
    to_megatron(dict(HfFolder(folder / "theirs").tensors()), model)
    write_folder(folder / "ours", to_hf(model), like=folder / "theirs")

    ours = load_file(folder / "ours" / "model.safetensors")
    assert sorted(hf_names(model[0])) == sorted(ours)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    again = type(hf).from_pretrained(folder / "ours")
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, hf.get_parameter(name)), name
    return ours


def wrong_shape_is_named(model: list[Qwen3VLModel], weights: Named, name: str, shape: tuple[int, ...]) -> None:
    """A tensor of another shape than the model's is refused with its name and shape."""
    weights[name] = torch.zeros(shape)

    with pytest.raises(WeightsError) as failure:
        to_megatron(weights, model)

    assert f"{name} {list(shape)}" in str(failure.value), str(failure.value)
