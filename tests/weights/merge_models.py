"""Models to merge: folders of a few thousand random values, and models that are nothing but tensors in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from copd_megatron.weights.hf import HfFolder, write_folder
from copd_megatron.weights.merge.methods import METHODS, Terms
from copd_megatron.weights.merge.sources import WholeSource
from copd_megatron.weights.merge.stream import CHUNK, Stream, Workspace

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the tensors of the model that `LLAMA` describes."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32),
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    }
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        found |= {prefix + f"{norm}_layernorm.weight": (32,) for norm in ("input", "post_attention")}
        heads = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
        found |= {prefix + f"self_attn.{name}_proj.weight": shape for name, shape in heads.items()}
        inner = {"gate": (48, 32), "up": (48, 32), "down": (32, 48)}
        found |= {prefix + f"mlp.{name}_proj.weight": shape for name, shape in inner.items()}
    return found


def values(seed: int, near: Mapping[str, Tensor] | None = None, by: float = 0.1) -> dict[str, Tensor]:
    """Random tensors float32, about 0.02 large; or those of `near`, changed by about `by` of that."""
    source = torch.Generator().manual_seed(seed)
    noise = {name: 0.02 * torch.randn(shape, generator=source) for name, shape in shapes().items()}
    return noise if near is None else {name: near[name] + by * noise[name] for name in noise}


def save(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, **config: object) -> Path:
    """A Hugging Face folder."""
    like = folder.with_name(f"{folder.name}.like")
    like.mkdir(exist_ok=True)
    (like / "config.json").write_text(json.dumps({**LLAMA, **config}))
    write_folder(folder, [(name, tensor.to(dtype)) for name, tensor in tensors.items()], like, overwrite=True)
    return folder


def family(folder: Path, count: int, dtype: torch.dtype = torch.float32, by: float = 0.1) -> tuple[Path, list[Path]]:
    """A base and `count` models made of it, as folders."""
    folder.mkdir(parents=True, exist_ok=True)
    start = values(0)
    inputs = [save(folder / f"input{seed}", values(seed, start, by), dtype) for seed in range(1, count + 1)]
    return save(folder / "base", start, dtype), inputs


def content(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    """Every tensor's format, shape and bytes."""
    return {
        name: (tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in HfFolder(folder).tensors()
    }


class InMemory:
    """A model of one tensor, called x."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def names(self) -> Sequence[str]:
        return ["x"]

    def shape(self, name: str) -> Sequence[int]:
        return self._tensor.shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor.dtype

    def tensor(self, name: str) -> Tensor:
        return self._tensor


def stream(base: Tensor, inputs: Sequence[Tensor], chunk: int = CHUNK) -> Stream:
    """Of tensors in memory."""
    sources = [WholeSource(str(number), InMemory(tensor), {}, None) for number, tensor in enumerate([base, *inputs])]
    return Stream("x", sources[0], sources[1:], Workspace(chunk))


def merged(method: str, base: Tensor, inputs: Sequence[Tensor], chunk: int = CHUNK, **terms: object) -> Tensor:
    """The result of a method, float32 of the base's shape; weights 1/n and generators of seeds 0 … by default."""
    given = {
        "weights": [1 / len(inputs)] * len(inputs),
        "generators": [torch.Generator().manual_seed(seed) for seed in range(len(inputs))],
        **terms,
    }
    if not method.startswith("dare"):
        given["generators"] = ()
    parts = METHODS[method](stream(base, inputs, chunk), Terms(**given))
    return torch.cat([part.clone() for part in parts]).reshape(base.shape)
