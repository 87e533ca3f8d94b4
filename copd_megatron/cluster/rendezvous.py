"""How the ranks of a gang find each other, on one machine and on several.

Rank 0 opens a store on its own node, on a port that is free there, and tells the others through the conductor's. From
then on the gang's collectives do not depend on the conductor.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed import DistStoreError, Store

from copd_megatron.errors import CopdError
from copd_megatron.exchange import address, serve

_PATIENCE = timedelta(seconds=600)
"""Longest wait of a rank for rank 0 of its gang, which may be importing its packages from a slow file system."""

_OURS, _SLURMS = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

log = logging.getLogger(__name__)


def by_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun has started this process; else the conductor has (in a job's environment too, maybe)."""
    return "RANK" not in environment and "SLURM_PROCID" in environment


@contextmanager
def joined(conductor: Store, gang: str, host: str, environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Make `os.environ` that of a torchrun worker, and have the gang's store for the `with` block.

    `gang` is a name that this start of the gang alone has, `host` the address of rank 0's node. Raises CopdError.
    """
    try:
        rank, world, local = (environment[name] for name in (_SLURMS if by_srun(environment) else _OURS))
    except KeyError as error:
        raise CopdError(f"{error.args[0]} is not set: only the conductor of a run starts its ranks") from error
    node = environment.get("SLURMD_NODENAME") or socket.gethostname()
    log.info("gang %s, rank %s of %s on %s", gang, rank, world, node)
    key = f"gang/{gang}"
    store = None  # rank 0 holds it
    if rank == "0":
        try:
            store = serve(host)
        except OSError as error:
            raise CopdError(
                f"rank 0 is on {node}, which has no address {host} ({error}); set cluster.interface to the network "
                "interface that all nodes share"
            ) from error
        conductor.set(key, f"{host}:{store.port}")
    else:
        try:
            conductor.wait([key], _PATIENCE)
        except DistStoreError as error:
            seconds = _PATIENCE.total_seconds()
            raise CopdError(f"rank {rank}: rank 0 of its gang has not appeared within {seconds:g} s") from error
    found, _, port = conductor.get(key).decode().rpartition(":")
    os.environ |= {**address(found, int(port)), "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local}
    yield
    del store
