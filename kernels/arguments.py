"""Checks of arguments: an error says which one is wrong, what it is and what was expected."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from copd_kernels.reference import Divergence, Tail

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MAX_K = 128


def check_logits(name: str, logits: Tensor, beside: tuple[str, Tensor] | None = None) -> None:
    """[T, V] of a floating format, of the shape and on the device of another one if given."""
    if logits.ndim != 2:
        raise ValueError(f"{name} has shape {_shape(logits)}, expected two dimensions, [tokens, vocabulary]")
    if logits.dtype not in FLOATS:
        raise TypeError(f"{name} is {logits.dtype}, expected one of {_names(FLOATS)}")
    if beside is not None:
        other, expected = beside
        check_device(name, logits, beside)
        if logits.shape != expected.shape:
            raise ValueError(f"{name} has shape {_shape(logits)}, expected {_shape(expected)}, that of {other}")


def check_per_token(
    name: str, values: Tensor, logits: tuple[str, Tensor], *, formats: tuple[torch.dtype, ...], width: bool = False
) -> None:
    """[T], or with `width` [T, K], of one of `formats`, with T and device of `logits`."""
    other, expected = logits
    check_device(name, values, logits)
    dimensions = "[tokens, K]" if width else "[tokens]"
    if values.ndim != (2 if width else 1) or len(values) != len(expected):
        raise ValueError(
            f"{name} has shape {_shape(values)}, expected {dimensions} with the {len(expected)} of {other}"
        )
    if values.dtype not in formats:
        raise TypeError(f"{name} is {values.dtype}, expected one of {_names(formats)}")


def check_device(name: str, values: Tensor, beside: tuple[str, Tensor]) -> None:
    other, expected = beside
    if values.device != expected.device:
        raise ValueError(f"{name} is on {values.device}, but {other} is on {expected.device}; move one of them")


def check_kind(kind: str, jsd_beta: float, temperature: float, tail: str = "bucket") -> None:
    """Raises ValueError unless the divergence exists, 0 ≤ `jsd_beta` ≤ 1 and `temperature` > 0."""
    if kind not in get_args(Divergence):
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(get_args(Divergence))}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail is {tail!r}, expected one of {', '.join(get_args(Tail))}")
    if not 0 <= jsd_beta <= 1:
        raise ValueError(f"jsd_beta is {jsd_beta}, expected a number from 0 to 1")
    check_temperature(temperature)


def check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: log-probabilities of greedy sampling do not exist; use > 0")


def check_k(k: int, vocabulary: int) -> None:
    """Raises ValueError unless 1 ≤ k ≤ 128 and the vocabulary has so many ids."""
    limit = min(MAX_K, vocabulary)
    if not 1 <= k <= limit:
        raise ValueError(f"k is {k}, expected 1 to {limit} for a vocabulary of {vocabulary}")


def check_top(
    student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, name: str = "student_logits"
) -> None:
    """The teacher's top-k: ids and log-probabilities [T, K], 1 ≤ K ≤ 128."""
    beside = (name, student_logits)
    check_per_token("teacher_ids", teacher_ids, beside, formats=INTEGERS, width=True)
    check_per_token("teacher_logprobs", teacher_logprobs, beside, formats=FLOATS, width=True)
    if teacher_ids.shape != teacher_logprobs.shape:
        expected = f"{_shape(teacher_ids)}, that of teacher_ids"
        raise ValueError(f"teacher_logprobs has shape {_shape(teacher_logprobs)}, expected {expected}")
    if not 1 <= teacher_ids.shape[1] <= MAX_K:
        raise ValueError(f"teacher_ids has {teacher_ids.shape[1]} ids per token, expected 1 to {MAX_K}")


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _names(formats: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(format).removeprefix("torch.") for format in formats)
