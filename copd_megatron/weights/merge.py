"""Merging the branches into one model: the paper's parameter average (docs/method.md), tensor by tensor.

    copd merge text/ image/ --base base/ --method linear -o merged/

Arithmetic is float32 whatever the files hold, and the result is rounded once, to the base's number format. No more
than one shard of the result is in memory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.weights.hf import SHARD_BYTES, HfFolder, write_folder

logger = logging.getLogger(__name__)

_AVERAGED = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 2**24  # elements worked on at once: 64 MiB per input in float32


def linear(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weighted sum of tensors of one shape, computed in float32 and rounded once to `dtype`.

    The order of the inputs does not matter, to the last bit: each element's products are summed from the smallest to
    the largest. (Addition of floats is commutative but not associative.)
    """
    out = torch.empty(tensors[0].shape, dtype=dtype)
    flat = [tensor.reshape(-1) for tensor in tensors]
    for chunk in range(0, out.numel(), _CHUNK):
        part = slice(chunk, chunk + _CHUNK)
        products = torch.stack([one[part].float() * weight for one, weight in zip(flat, weights, strict=True)])
        if len(products) > 2:
            products = products.sort(dim=0).values
        total = products[0]
        for product in products[1:]:
            total = total + product
        out.view(-1)[part] = total
    return out


METHODS: dict[str, Callable[[Sequence[torch.Tensor], Sequence[float], torch.dtype], torch.Tensor]] = {"linear": linear}


def merge_folders(
    inputs: Sequence[Path],
    out: Path,
    base: Path,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Merge the Hugging Face folders `inputs` into the folder `out`, in the form of `base`.

    `base` gives the names, shapes, number formats, configuration and tokenizer. `weights`, one per input, must sum to
    1; by default they are equal. Raises WeightsError, and leaves `out` alone, if an input has other tensors or shapes
    than the base, or a value of the result is not finite.
    """
    if method not in METHODS:
        raise WeightsError(f"merge method {method!r} does not exist; there is: {', '.join(METHODS)}")
    shares = _shares(len(inputs), weights)
    reference = HfFolder(base)
    folders = [HfFolder(path) for path in inputs]
    for folder in folders:
        _refuse_other_form(folder, reference)
    logger.info("merging %s into %s (%s, weights %s)", ", ".join(map(str, inputs)), out, method, shares)
    write_folder(out, _merged(folders, reference, METHODS[method], shares), base, max_shard_bytes, overwrite)


def _merged(
    folders: Sequence[HfFolder],
    reference: HfFolder,
    method: Callable[[Sequence[torch.Tensor], Sequence[float], torch.dtype], torch.Tensor],
    shares: Sequence[float],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in reference.names():
        tensors = [folder.tensor(name) for folder in folders]
        if not reference.dtype(name).is_floating_point:
            yield name, _same(name, tensors, folders, reference.dtype(name))
            continue
        _refuse_format(name, [reference, *folders])
        result = method(tensors, shares, reference.dtype(name))
        if not bool(torch.isfinite(result).all()):
            _explain_not_finite(name, tensors, folders, reference.dtype(name))
        yield name, result


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise WeightsError("nothing to merge: give at least one folder")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count:
        raise WeightsError(f"merge weights: {len(weights)} given for {count} folders; give one for each")
    if not all(math.isfinite(weight) for weight in weights) or abs(sum(weights) - 1) > 1e-6:
        raise WeightsError(f"merge weights must be finite and sum to 1; found {list(weights)}, sum {sum(weights):g}")
    return list(weights)


def _refuse_other_form(folder: HfFolder, reference: HfFolder) -> None:
    mine, theirs = set(folder.names()), set(reference.names())
    lines = [f"  {name}: missing" for name in sorted(theirs - mine)]
    lines += [f"  {name}: not in the base" for name in sorted(mine - theirs)]
    lines += [
        f"  {name}: shape {list(folder.shape(name))}, in the base {list(reference.shape(name))}"
        for name in sorted(mine & theirs)
        if folder.shape(name) != reference.shape(name)
    ]
    if lines:
        shown = lines[:20] + ([f"  and {len(lines) - 20} more"] if len(lines) > 20 else [])
        raise WeightsError(
            f"{folder.path}: has other tensors than the base {reference.path}; only models of one base can be merged\n"
            + "\n".join(shown)
        )


def _refuse_format(name: str, folders: Sequence[HfFolder]) -> None:
    for folder in folders:
        if folder.dtype(name) not in _AVERAGED:
            raise WeightsError(
                f"{folder.path}: tensor {name} is {folder.dtype(name)}, which cannot be averaged; "
                f"expected one of {', '.join(map(str, _AVERAGED))}"
            )


def _same(name: str, tensors: Sequence[torch.Tensor], folders: Sequence[HfFolder], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of integers or booleans, which cannot be averaged and must therefore be the same everywhere."""
    for tensor, folder in zip(tensors, folders, strict=True):
        if tensor.dtype != dtype or not torch.equal(tensor, tensors[0]):
            raise WeightsError(
                f"{folder.path}: tensor {name} is {dtype} in the base, which cannot be averaged, "
                f"and differs here from {folders[0].path}"
            )
    return tensors[0]


def _explain_not_finite(
    name: str, tensors: Sequence[torch.Tensor], folders: Sequence[HfFolder], dtype: torch.dtype
) -> None:
    for tensor, folder in zip(tensors, folders, strict=True):
        if not bool(torch.isfinite(tensor).all()):
            raise WeightsError(f"{folder.path}: tensor {name} holds NaN or infinite values; that training went wrong")
    raise WeightsError(f"tensor {name}: the merged values do not fit into the base's {dtype}")
