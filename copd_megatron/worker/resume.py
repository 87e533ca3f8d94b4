"""Which part of a checkpoint is this rank's, when the run goes on with as many replicas as before or with others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from copd_megatron.data.sampler import furthest

State = dict[str, Any]


def rank_state(replica: int, streams: State | None) -> State:
    """What a rank saves: its replica's number and, on the replica's first rank, how far each prompt stream is."""
    return {"replica": replica, "streams": streams}


def own_streams(ranks: Sequence[State], replica: int, replicas: int) -> State:
    """Where the prompt streams of `replica` go on, from what every rank has saved.

    With another number of replicas than before, all go on from the furthest position: a position counts the places
    that all replicas together have passed, so no example comes twice and none is left out, except where replicas had
    refused different numbers of prompts.
    """
    saved = {rank["replica"]: rank["streams"] for rank in ranks if rank["streams"] is not None}
    if len(saved) == replicas:
        own: State = saved[replica]
        return own
    return {
        name: _joined([streams[name] for streams in saved.values()], replica) for name in next(iter(saved.values()))
    }


def _joined(streams: Sequence[State], replica: int) -> State:
    refused: Counter[str] = Counter()
    for stream in streams if replica == 0 else ():  # counted once, not once per replica
        refused.update(stream["refused"])
    return {"sampler": furthest([stream["sampler"] for stream in streams]), "refused": dict(refused)}
