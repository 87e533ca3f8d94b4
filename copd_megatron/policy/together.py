"""Work that every rank of a gang does, and whose failure on one of them is everyone's.

A rank that raised alone would leave the others waiting in the next collective operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from copd_megatron.policy import platform

Value = TypeVar("Value")


class Failed(Exception):
    """This rank or another one could not do its part; the message is the first failed rank's."""


def together(work: Callable[[], Value]) -> list[Value]:
    """Every rank's result of `work`, in order of rank; Failed on every rank if it fails on one. Collective."""
    outcome: tuple[Value | None, str | None]
    try:
        outcome = (work(), None)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        outcome = (None, str(error) or type(error).__name__)
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failed := [reason for _, reason in outcomes if reason is not None]:
        raise Failed(failed[0])
    return [value for value, _ in outcomes]


def on_first_rank(work: Callable[[], object]) -> None:
    """Do `work` on rank 0 alone; Failed on every rank if it fails. Collective."""
    together(lambda: work() if dist.get_rank() == 0 else None)


def all_ranks(condition: bool) -> bool:
    """Whether `condition` holds on every rank. Collective, and cheap enough for every step."""
    flag = torch.tensor([int(condition)], device=platform.device())
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def reason_of(error: BaseException) -> str:
    """What went wrong, without the stacks that torch adds."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({str(failure) for failure, _ in error.failures.values()}))
    return str(error)
