"""One rank of a branch's gang: `python -m copd_megatron.worker --run-dir RUN --branch NAME …`.

The conductor starts it, by srun if it runs on a cluster; nobody else needs to. It may outlive the conductor: it ends
when the run's store is gone (heartbeat.py).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path

from copd_megatron.errors import CopdError, Interrupted, PeerLost
from copd_megatron.supervision.run_lock import hold_worker_lock


def main() -> int:
    """Train the branch from `--resume` to the end and export it. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", required=True, help="run directory")
    parser.add_argument("--branch", required=True, help="name of the branch")
    parser.add_argument("--store", required=True, help="HOST:PORT of the conductor's store")
    parser.add_argument("--resume", type=int, required=True, help="checkpoint step to go on from, 0 for the base")
    parser.add_argument("--rank0-host", required=True, help="the address of rank 0's node")
    parser.add_argument("--gang", required=True, help="a name of this start of the gang")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")

    hold_worker_lock(Path(arguments.run_dir))

    from copd_megatron.policy import platform

    platform.prepare()

    from copd_megatron.cluster.rendezvous import by_srun, joined
    from copd_megatron.exchange import reach

    host, _, number = arguments.store.rpartition(":")
    port = int(number)
    if by_srun():
        # Slurm tells all tasks of a job that is to end with SIGTERM; what comes of it is the conductor's decision. (Not
        # SIG_IGN, which processes started from here would inherit.)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
    with joined(reach(host, port), arguments.gang, arguments.rank0_host):
        return _train(arguments, host, port)


def _train(arguments: argparse.Namespace, host: str, port: int) -> int:
    from copd_megatron.exchange import connect
    from copd_megatron.train import train
    from copd_megatron.worker import heartbeat
    from copd_megatron.worker.opening import open_branch

    rank = int(os.environ["RANK"])
    heart = heartbeat.connect(host, port, arguments.branch, rank)
    exchange = connect(host, port, arguments.branch) if rank == 0 else None
    branch = None
    try:
        branch = open_branch(arguments.run_dir, arguments.branch, exchange, arguments.resume, arguments.rank0_host)
        train(branch, branch.rhythm)
        branch.export()
        ending = "done"
    except Interrupted:
        ending = "interrupted"
    except PeerLost as error:
        logging.getLogger(__name__).error("%s", error)
        ending = f"lost: {error}"
    except CopdError as error:
        logging.getLogger(__name__).error("%s", error)
        ending = f"failed: {error}"
        heart.refuse(str(error))
    except BaseException as error:
        logging.getLogger(__name__).exception("branch %s", arguments.branch)
        ending = f"crashed: {type(error).__name__}: {error}"
    if exchange is not None:  # first of all: when one rank ends with a failure, the others have little time left
        exchange.end(ending)
    if branch is not None:
        branch.close(ending)
    return int(ending not in ("done", "interrupted"))


if __name__ == "__main__":
    sys.exit(main())
