"""The transformers module inside the embedded engine: opening it, and giving it the weights of a version."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.weights.families.qwen3_vl_moe import DOWN, GATE_UP
from copd_megatron.weights.hf import read_config

if TYPE_CHECKING:
    from transformers import (
        PreTrainedTokenizerBase,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeForConditionalGeneration,
    )


def open_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a Hugging Face folder. Raises WeightsError if there is none."""
    # Without these files transformers makes up an empty tokenizer of the model's kind.
    if not any((model_dir / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise WeightsError(f"{model_dir}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt")
    declare_torchvision_schemas()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{model_dir}: the tokenizer cannot be read ({error})") from error


def open_module(
    model_dir: Path, dtype: torch.dtype
) -> Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration:
    """The Qwen3-VL that `model_dir` describes, ready for inference, with arbitrary weights.

    Raises WeightsError if the folder has no config or describes another kind of model.
    """
    declare_torchvision_schemas()
    import transformers

    content = read_config(model_dir)
    kinds = {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
    kind = kinds.get(str(content.get("model_type")))
    if kind is None:
        raise WeightsError(
            f"{model_dir / 'config.json'}: model_type is {content.get('model_type')!r}; the embedded engine runs "
            f"{' and '.join(map(repr, kinds))}, other models need a rollout server"
        )
    config = getattr(transformers, f"{kind}Config").from_dict(content)
    # Building a module initialises it with torch's global random numbers, which belong to nobody here.
    with torch.random.fork_rng(devices=[]):
        module = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    prepared: Qwen3VLForConditionalGeneration | Qwen3VLMoeForConditionalGeneration = module.to(dtype).eval()
    return prepared.requires_grad_(False)


EXPERT_STACKS = (GATE_UP, DOWN)
"""Endings of names whose matrices transformers holds transposed, other than Qwen publishes them."""


class WeightLoader:
    """Copies Hugging Face named tensors into a module's own, one at a time, and checks that the set is complete.

    `intact` is False from the first copied tensor until a set is complete: after an error in between, the module
    holds parts of two versions and must not be used.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.intact = True
        self._parameters = dict(module.named_parameters())
        # Names that share a tensor (tied embeddings): a set may have one of them or all.
        every = dict(module.named_parameters(remove_duplicate=False))
        owner = {id(tensor): name for name, tensor in self._parameters.items()}
        self._alias = {name: owner[id(tensor)] for name, tensor in every.items()}

    @torch.no_grad()
    def load(self, named: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take all of `named`. Raises WeightsError naming what is unknown, missing or of another shape."""
        seen: set[str] = set()
        for name, tensor in named:
            if name not in self._alias:
                raise WeightsError(f"weight {name!r} is unknown to the model{self._state()}")
            owner = self._alias[name]
            parameter = self._parameters[owner]
            published = name.endswith(EXPERT_STACKS) and tensor.dim() == 3 and tensor.shape != parameter.shape
            if published and tensor.mT.shape == parameter.shape:
                tensor = tensor.mT
            if tensor.shape != parameter.shape:
                raise WeightsError(
                    f"weight {name!r} has shape {list(tensor.shape)}, "
                    f"the model expects {list(parameter.shape)}{self._state()}"
                )
            if owner in seen:
                if not torch.equal(tensor.to(parameter), parameter):
                    raise WeightsError(f"weight {name!r} came twice, or differs from {owner!r} to which it is tied")
                continue
            self.intact = False
            parameter.copy_(tensor)
            seen.add(owner)
        if missing := sorted(self._parameters.keys() - seen):
            raise WeightsError(f"missing weights: {_listed(missing)}{self._state()}")
        self.intact = True

    def _state(self) -> str:
        return "" if self.intact else "; the model now holds parts of two versions and needs a complete set"


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
