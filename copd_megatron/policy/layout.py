"""How one branch's processes divide the model: the degrees, and the process groups made from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from copd_megatron.errors import ConfigError
from copd_megatron.policy import platform

Value = TypeVar("Value")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of one branch.

    `world` processes; `tp` tensor, `pp` pipeline, `vpp` virtual pipeline stages per process, `cp` context, `ep` expert,
    `etp` expert tensor parallel. What is left over is data parallelism (`dp`).
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        degrees = {name: getattr(self, name) for name in ("world", "tp", "pp", "vpp", "cp", "ep", "etp")}
        for name, degree in degrees.items():
            if degree < 1:
                raise ConfigError(f"parallel.{name} is {degree}; a degree of parallelism is at least 1")
        unsupported = [f"{name} = {degrees[name]}" for name in ("vpp", "cp", "ep", "etp") if degrees[name] > 1]
        unsupported += ["sequence_parallel"] if self.sequence_parallel else []
        if unsupported:
            raise ConfigError(f"parallel: {', '.join(unsupported)} is not supported yet; use tp, pp and more processes")
        if self.world % (self.tp * self.pp):
            raise ConfigError(
                f"parallel: world = {self.world} processes cannot be divided into replicas of tp × pp = "
                f"{self.tp} × {self.pp} = {self.tp * self.pp} processes; make world a multiple of that"
            )

    @property
    def replica(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tp * self.pp

    @property
    def dp(self) -> int:
        """Copies of the model."""
        return self.world // self.replica


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
    parallel_state.initialize_model_parallel(layout.tp, layout.pp)
    model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the process groups. The process can `initialize` again."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def is_replica_leader() -> bool:
    """Whether this process speaks for its copy of the model: first in tensor and pipeline."""
    from megatron.core import parallel_state

    return dist.get_rank(parallel_state.get_model_parallel_group()) == 0


def is_last_stage() -> bool:
    """Whether this process has the logits."""
    from megatron.core import parallel_state

    return parallel_state.is_pipeline_last_stage()


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
    from megatron.core import parallel_state

    group = parallel_state.get_model_parallel_group()
    box = [value]
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]  # type: ignore[return-value]


def broadcast_in_gang(value: Value | None) -> Value:
    """Rank 0's `value` on every process of the gang; the others' own is ignored."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
