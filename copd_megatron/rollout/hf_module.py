"""The transformers module inside the embedded engine: opening it, and giving it the weights of a version."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.weights.families.qwen2_5_vl import published_name
from copd_megatron.weights.families.qwen3_vl_moe import DOWN, GATE_UP
from copd_megatron.weights.hf import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
}
"""transformers' classes by the `model_type` in config.json."""


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


def open_config(model_dir: Path) -> PreTrainedConfig:
    """The configuration of the model in a Hugging Face folder. Raises WeightsError for a family not in `CLASSES`."""
    declare_torchvision_schemas()
    import transformers

    content = read_config(model_dir)
    name = CLASSES.get(str(content.get("model_type")))
    if name is None:
        raise WeightsError(
            f"{model_dir / 'config.json'}: model_type is {content.get('model_type')!r}, expected one of "
            f"{', '.join(map(repr, CLASSES))}"
        )
    return getattr(transformers, name).config_class.from_dict(content)


def open_module(model_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `model_dir` describes, ready for inference, with arbitrary weights.

    Raises WeightsError if the folder has no config or describes a model that the engine cannot run.
    """
    config = open_config(model_dir)
    import transformers

    kind = getattr(transformers, CLASSES[config.model_type])
    if getattr(config.get_text_config(), "use_sliding_window", False):
        raise WeightsError(
            f"{model_dir / 'config.json'}: use_sliding_window is true, but the embedded engine attends to all tokens; "
            "set it to false, or use a rollout server"
        )
    # Building a module initialises it with torch's global random numbers, which belong to nobody here.
    with torch.random.fork_rng(devices=[]):
        module: PreTrainedModel = kind(config)
    return module.to(dtype).eval().requires_grad_(False)


def language_model(module: Any) -> Any:
    """The language model in a module of `open_module`: all but the output layer and the vision tower."""
    return getattr(module.model, "language_model", module.model)


EXPERT_STACKS = (GATE_UP, DOWN)
"""Endings of names whose matrices transformers holds transposed, other than Qwen publishes them."""


class WeightLoader:
    """Copies Hugging Face named tensors into a module's own, one at a time, and checks that the set is complete.

    `intact` is False from the first copied tensor until a set is complete: after an error in between, the module
    holds parts of two versions and must not be used.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.intact = True
        self._parameters: dict[str, torch.Tensor] = {}
        # Names that share a tensor (tied embeddings): a set may have one of them or all.
        self._alias: dict[str, str] = {}
        owners: dict[int, str] = {}
        for name, tensor in _published(module):
            owner = owners.setdefault(id(tensor), name)
            self._parameters[owner] = tensor
            self._alias[name] = owner

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


def _published(module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in published files, parameter or part of one) of all that `module` takes; tied tensors come repeatedly."""
    family = module.config.model_type
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer, _, matrix = name.partition("mlp.experts.")
        if family == "qwen2_5_vl":
            yield published_name(name), parameter
        elif family == "qwen3_moe" and matrix:
            projections = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else (matrix,)
            for number, expert in enumerate(parameter):
                for projection, part in zip(projections, expert.chunk(len(projections)), strict=True):
                    yield f"{layer}mlp.experts.{number}.{projection}.weight", part
        else:
            yield name, parameter


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
