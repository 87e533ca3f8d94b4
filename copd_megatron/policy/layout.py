"""The process groups of one branch, made from its `Layout`."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from copd_megatron.errors import ConfigError
from copd_megatron.policy import platform
from copd_megatron.policy.degrees import Layout

__all__ = [
    "Layout",
    "broadcast_in_gang",
    "broadcast_in_replica",
    "data_parallel_rank",
    "data_parallel_size",
    "initialize",
    "is_last_stage",
    "is_replica_leader",
    "replica_group",
    "shutdown",
]

Value = TypeVar("Value")


def initialize(layout: Layout, seed: int = 0, timeout_seconds: float = 1800.0) -> None:
    """Join the branch's processes and divide them as `layout` says.

    Reads torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it the process is
    alone, and needs no port. `seed` goes to the tracker of tensor-parallel random states.
    """
    platform.prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != layout.world:
        raise ConfigError(f"parallel.world is {layout.world}, but {world} processes were started (WORLD_SIZE)")
    if layout.tp > 1:
        # Lets gradients travel while the next product is computed; must be there before CUDA starts.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if platform.on_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        if "RANK" in os.environ:
            dist.init_process_group(platform.backend(), timeout=timeout)
        else:
            dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
    )
    _join_replica(layout)
    model_parallel_cuda_manual_seed(seed)


_replica: dist.ProcessGroup | None = None
"""The processes that hold one copy of the model: with context parallelism, none of megatron-core's groups."""


def _join_replica(layout: Layout) -> None:
    from megatron.core.parallel_state import RankGenerator

    global _replica
    order = RankGenerator(layout.tp, 1, layout.dp, layout.pp, layout.cp, order="tp-cp-ep-dp-pp")
    for ranks in order.get_ranks("tp-cp-pp"):
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            _replica = group


def replica_group() -> dist.ProcessGroup:
    """The processes that hold one copy of the model together; `initialize` has made it."""
    if _replica is None:
        raise RuntimeError("layout.initialize has not been called")
    return _replica


def shutdown() -> None:
    """Leave the process groups. The process can `initialize` again."""
    from megatron.core import parallel_state

    global _replica
    _replica = None
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def is_replica_leader() -> bool:
    """Whether this process speaks for its copy of the model: first in tensor, context and pipeline."""
    return dist.get_rank(replica_group()) == 0


def is_last_stage() -> bool:
    """Whether this process has the logits."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def data_parallel_rank() -> int:
    """Which copy of the model this process belongs to."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Copies of the model."""
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_world_size()


def broadcast_in_replica(value: Value | None) -> Value:
    """The replica leader's `value` on every process of the replica; the others' own is ignored."""
    group = replica_group()
    box = [value]
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]  # type: ignore[return-value]


def gather_in_gang(value: Value) -> list[Value]:
    """Every process's `value`, in the order of their ranks, on every process of the gang."""
    if dist.get_world_size() == 1:
        return [value]
    gathered: list[Value] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_in_gang(value: Value | None) -> Value:
    """Rank 0's `value` on every process of the gang; the others' own is ignored."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
