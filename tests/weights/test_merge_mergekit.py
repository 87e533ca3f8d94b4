"""Methods of the same name and definition give what mergekit gives.

In bfloat16: within one last place. In float32, which is also the format of the arithmetic, both sides have rounded
every product and every sum, ours in another order: within two, three where there is a division (`FLOAT32`). A place is
counted at the largest of the values that an element is made of: where a merged value is the small difference of larger
ones, its own is below what float32 arithmetic can tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import family
from torch import Tensor

from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.merge.folders import merge_folders
from copd_megatron.weights.merge.recipe import Recipe

Merge = Callable[..., dict[str, Tensor]]

FLOAT32 = {"linear": 2, "slerp": 2, "task": 2, "ties": 3}


@pytest.fixture(scope="module")
def mergekit() -> Merge:
    """(out, base, inputs, method, dtype, weights, **parameters) -> the tensors that mergekit makes."""
    declare_torchvision_schemas()
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    def merge(
        out: Path,
        base: Path | None,
        inputs: list[Path],
        method: str,
        dtype: torch.dtype,
        own: list[dict[str, float]] | None = None,
        **parameters: Any,
    ) -> dict[str, Tensor]:
        models = [
            {"model": str(path), "parameters": given}
            for path, given in zip(inputs, own or [{}] * len(inputs), strict=True)
        ]
        description = {
            "merge_method": method,
            "models": models,
            "parameters": parameters,
            "dtype": "float32",
            "out_dtype": str(dtype).removeprefix("torch."),
            **({"base_model": str(base)} if base else {}),
        }
        options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
        run_merge(MergeConfiguration.model_validate(description), str(out), options=options)
        return dict(HfFolder(out).tensors())

    return merge


def _ours(out: Path, base: Path, inputs: list[Path], recipe: Recipe) -> dict[str, Tensor]:
    merge_folders(inputs, out, base, recipe)
    return dict(HfFolder(out).tensors())


def _last_places(ours: Tensor, theirs: Tensor, among: list[Tensor]) -> float:
    """The largest difference in last places of the format of `ours`, at the largest value of each element's sources."""
    assert ours.dtype == theirs.dtype
    largest = torch.stack([tensor.double().abs() for tensor in (theirs, *among)]).amax(0)
    bits = {torch.float32: 23, torch.bfloat16: 7}[ours.dtype]
    place = torch.exp2(largest.clamp(min=1e-30).log2().floor() - bits)
    return float(((ours.double() - theirs.double()).abs() / place).max())


def _places(method: str, dtype: torch.dtype) -> int:
    return FLOAT32[method] if dtype == torch.float32 else 1


def _assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], sources: list[Path], places: float) -> None:
    assert ours.keys() == theirs.keys()
    folders = [HfFolder(path) for path in sources]
    for name in ours:
        assert _last_places(ours[name], theirs[name], [folder.tensor(name) for folder in folders]) <= places, name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("weights", "normalise"), [((1.0, 1.0, 1.0), True), ((0.2, 0.5, 0.9), True), ((0.2, 0.5, 0.9), False)]
)
def test_linear(
    mergekit: Merge, tmp_path: Path, stored: torch.dtype, weights: tuple[float, ...], normalise: bool
) -> None:
    base, inputs = family(tmp_path, 3, stored)
    own = [{"weight": weight} for weight in weights]
    theirs = mergekit(tmp_path / "theirs", None, inputs, "linear", stored, own, normalize=normalise)
    ours = _ours(tmp_path / "ours", base, inputs, Recipe(weights=weights, normalise=normalise))
    _assert_same(ours, theirs, inputs, _places("linear", stored))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by", [0.02, 1.0])  # nearly parallel, and at a considerable angle
def test_slerp(mergekit: Merge, tmp_path: Path, stored: torch.dtype, by: float) -> None:
    base, inputs = family(tmp_path, 2, stored, by)
    theirs = mergekit(tmp_path / "theirs", inputs[0], inputs, "slerp", stored, t=0.3)
    ours = _ours(tmp_path / "ours", base, inputs, Recipe("slerp", weights=(0.7, 0.3)))
    _assert_same(ours, theirs, inputs, _places("slerp", stored))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("scale", "normalise"), [(1.0, False), (0.6, True)])
def test_task(mergekit: Merge, tmp_path: Path, stored: torch.dtype, scale: float, normalise: bool) -> None:
    base, inputs = family(tmp_path, 3, stored)
    weights = (0.3, 0.5, 0.4)
    own = [{"weight": weight} for weight in weights]
    parameters = {"lambda": scale, "normalize": normalise}
    theirs = mergekit(tmp_path / "theirs", base, inputs, "task_arithmetic", stored, own, **parameters)
    ours = _ours(tmp_path / "ours", base, inputs, Recipe("task", weights, scale=scale, normalise=normalise))
    _assert_same(ours, theirs, [base, *inputs], _places("task", stored))


@pytest.mark.parametrize("rounded", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("density", "normalise"), [(0.2, True), (0.7, False), (1.0, True)])
def test_ties(mergekit: Merge, tmp_path: Path, rounded: torch.dtype, density: float, normalise: bool) -> None:
    # float32 inputs: bfloat16 has so few values that many changes are equally large, or cancel out exactly.
    _, inputs = family(tmp_path, 3)
    exact, _ = family(tmp_path / "exact", 0)
    weights = (0.3, 0.5, 0.4)
    own = [{"weight": weight, "density": density} for weight in weights]
    theirs = mergekit(
        tmp_path / "theirs", exact, inputs, "ties", rounded, own, **{"lambda": 0.8, "normalize": normalise}
    )
    recipe = Recipe("ties", weights, density=density, normalise=normalise, scale=0.8)
    ours = {name: tensor.to(rounded) for name, tensor in _ours(tmp_path / "ours", exact, inputs, recipe).items()}
    _assert_same(ours, theirs, [exact, *inputs], _places("ties", rounded))


def test_multislerp(mergekit: Merge, tmp_path: Path) -> None:
    # mergekit adds 1e-8 to lengths, which are about 0.02 here: that, and sums in float32, are 4 last places.
    base, inputs = family(tmp_path, 3)
    weights = (0.3, 0.5, 0.4)
    own = [{"weight": weight} for weight in weights]
    theirs = mergekit(tmp_path / "theirs", base, inputs, "multislerp", torch.float32, own)
    ours = _ours(tmp_path / "ours", base, inputs, Recipe("multislerp", weights))
    _assert_same(ours, theirs, [base, *inputs], places=4)


@pytest.mark.parametrize("by", [0.1, 2.0])
def test_karcher(mergekit: Merge, tmp_path: Path, by: float) -> None:
    # mergekit takes angles from float32 cosines and stops at a step of 1e-5 of the length.
    base, inputs = family(tmp_path, 3, by=by)
    theirs = mergekit(tmp_path / "theirs", None, inputs, "karcher", torch.float32)
    ours = _ours(tmp_path / "ours", base, inputs, Recipe("karcher"))
    for name in ours:
        assert float((ours[name] - theirs[name]).norm() / theirs[name].norm()) <= 3e-5, name
