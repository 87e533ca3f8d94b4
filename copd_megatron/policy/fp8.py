"""FP8 training of the language model: what megatron-core is told, what it asks of a batch, what a machine lacks for it.

The matrix products of the decoder layers are computed in FP8 by Transformer Engine; weights, activations between
layers, attention, embedding, output layer and the vision tower stay in bfloat16, master weights and gradients in
float32. The recipes differ in who shares a scaling factor:

    tensorwise   each tensor, from its present largest value
    delayed      each tensor, from the largest values of the steps before
    blockwise    1 × 128 values of activations and gradients, 128 × 128 of weights
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal

from copd_megatron.errors import ConfigError

Recipe = Literal["tensorwise", "delayed", "blockwise"]
Fp8 = Literal["none", "tensorwise", "delayed", "blockwise"]


@dataclass(frozen=True)
class Fp8Choice:
    """What a run asks for: a recipe, and how many layers at each end stay in bfloat16 (None: the recipe's default)."""

    recipe: Fp8 = "none"
    bf16_layers_at_start: int | None = None
    bf16_layers_at_end: int | None = None


NO_FP8 = Fp8Choice()
RECIPES: tuple[Recipe, ...] = ("tensorwise", "delayed", "blockwise")

FEATURE_MULTIPLE = 16
"""Transformer Engine refuses matrices whose sizes are no multiples of this."""


@dataclass(frozen=True)
class Needs:
    """What a recipe needs. `number_format`: megatron-core's name (`hybrid`: gradients have more exponent bits);
    `capability` of the GPU; least versions of Transformer Engine (as in `megatron.core.fp8_utils`) and of CUDA;
    `tokens`: the product of a layer input's leading sizes has to be a multiple of this."""

    number_format: Literal["hybrid", "e4m3"]
    capability: tuple[int, int]
    engine: tuple[int, int]
    cuda: tuple[int, int]
    tokens: int


NEEDS: dict[Recipe, Needs] = {
    "tensorwise": Needs("hybrid", (8, 9), (2, 2), (12, 1), 16),
    "delayed": Needs("hybrid", (8, 9), (1, 8), (12, 1), 16),
    "blockwise": Needs("e4m3", (9, 0), (2, 3), (12, 9), 128),
}


@dataclass(frozen=True)
class Machine:
    """What decides about FP8. `capability`: the lowest compute capability of the GPUs, None without any; `engine`:
    Transformer Engine's version, or why it cannot be used; `cuda`: the version torch was built for, None for none."""

    capability: tuple[int, int] | None
    engine: tuple[int, int] | str
    cuda: tuple[int, int] | None

    @staticmethod
    def found() -> Machine:
        """This process's machine. Loads torch, and Transformer Engine where there is a GPU for it."""
        import torch

        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        cuda = torch.version.cuda
        return Machine(
            capability=min(capabilities, default=None),
            engine=transformer_engine(load=bool(capabilities)),
            cuda=None if cuda is None else major_minor(cuda),
        )


def transformer_engine(load: bool) -> tuple[int, int] | str:
    """Transformer Engine's version, or why it cannot be used; with `load` it is imported, torch first."""
    try:
        version = metadata.version("transformer-engine")
    except metadata.PackageNotFoundError:
        return "Transformer Engine is not installed"
    if load:
        try:
            importlib.import_module("torch")
            importlib.import_module("transformer_engine.pytorch")
        except Exception as error:  # a broken installation can raise anything
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
            return f"Transformer Engine {version} does not load ({type(error).__name__}: {reason})"
    return major_minor(version)


def why_not(recipe: Recipe, machine: Machine | None = None) -> str | None:
    """Everything that `machine` (default: this one) lacks for `recipe`, in one line; None if it can be used."""
    machine, needs = machine or Machine.found(), NEEDS[recipe]
    lacks = []
    if machine.capability is None:
        lacks.append("there is no GPU that torch can use")
    elif machine.capability < needs.capability:
        lacks.append(f"compute capability is {_dotted(machine.capability)}, {_dotted(needs.capability)} is needed")
    if isinstance(machine.engine, str):
        lacks.append(machine.engine)
    elif machine.engine < needs.engine:
        lacks.append(f"Transformer Engine is {_dotted(machine.engine)}, {_dotted(needs.engine)} is needed")
    if machine.cuda is None:
        lacks.append("torch is built without CUDA")
    elif machine.cuda < needs.cuda:
        lacks.append(f"torch is built for CUDA {_dotted(machine.cuda)}, {_dotted(needs.cuda)} is needed")
    return "; ".join(lacks) or None


def token_multiple(recipe: Fp8) -> int:
    """The packed tokens [T, 1, H] that a layer gets on one process must be a multiple of this; 1 without FP8.

    The backward pass multiplies along T, and Transformer Engine takes no sizes there but multiples of 16; blocks of 128
    must be whole wherever they travel between processes. Where sequence or context parallelism divides the tokens, each
    process's share must be such a multiple.
    """
    return 1 if recipe == "none" else NEEDS[recipe].tokens


def fp8_options(
    recipe: Fp8,
    *,
    layers: int,
    stages: int = 1,
    bf16_layers_at_start: int | None = None,
    bf16_layers_at_end: int | None = None,
    sizes: Mapping[str, int] | None = None,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Keywords for the language model's `TransformerConfig`; none without FP8. The vision tower gets none of them.

    `layers` of the model are divided over `stages` of the pipeline. The layers that stay in bfloat16 are one at each
    end where nothing is said (None), none under `delayed`. `sizes` are those of one process's matrices by the name of
    the setting they come from.

    ConfigError, naming what is missing, where this machine, the layers or the sizes do not allow the recipe.
    """
    if recipe == "none":
        return {}
    missing = why_not(recipe, machine)
    if missing:
        raise ConfigError(f"precision.fp8 = {recipe} cannot be used here: {missing}; set precision.fp8=none")
    for name, size in (sizes or {}).items():
        if size % FEATURE_MULTIPLE:
            raise ConfigError(
                f"precision.fp8 = {recipe}: {name} gives each process matrices of {size}, which is no multiple of "
                f"{FEATURE_MULTIPLE}; lower parallel.tp, or set precision.fp8=none"
            )
    needs = NEEDS[recipe]
    options: dict[str, Any] = {"fp8": needs.number_format, "fp8_recipe": recipe}
    if recipe == "delayed":
        _check_delayed(bf16_layers_at_start, bf16_layers_at_end)
        # As in Transformer Engine; megatron-core's own default is the step before alone, and steps differ.
        return {**options, "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    kept = {"start": bf16_layers_at_start, "end": bf16_layers_at_end}
    per_stage = layers // stages
    for end, count in kept.items():
        kept[end] = count = 1 if count is None else count
        if not 0 <= count <= per_stage:
            raise ConfigError(
                f"precision.fp8_bf16_layers_at_{end} = {count}: expected 0 to {per_stage}, the layers of a pipeline "
                "stage"
            )
    return {
        **options,
        "first_last_layers_bf16": bool(kept["start"] or kept["end"]),
        "num_layers_at_start_in_bf16": kept["start"],
        "num_layers_at_end_in_bf16": kept["end"],
    }


def _check_delayed(bf16_layers_at_start: int | None, bf16_layers_at_end: int | None) -> None:
    """ConfigError if layers are to stay in bfloat16: `delayed` reduces the largest values of all layers together."""
    if bf16_layers_at_start or bf16_layers_at_end:
        raise ConfigError(
            "precision.fp8 = delayed has every layer in FP8, because the scaling factors of all layers are renewed "
            "together; leave fp8_bf16_layers_at_start and fp8_bf16_layers_at_end out, or choose fp8=tensorwise"
        )


def major_minor(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = (int(part) for part in re.findall(r"\d+", version)[:2])
    return major, minor


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
