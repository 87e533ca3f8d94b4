"""Ports for servers that begin to listen a while after their ports were chosen."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _HIGHEST, _ENOUGH = 10_000, 65_535, 1_000


def free_ports(address: str, count: int) -> list[int]:
    """`count` ports of `address` that nobody listens on. Raises OSError if this machine has no such address.

    Where there are any they are none of those that the system gives to outgoing connections (Linux): a server takes
    minutes to start, and one of these could be in use by then.
    """
    sockets: list[socket.socket] = []
    try:
        for port in [*_candidates(count), *[0] * count]:
            if len(sockets) == count:
                break
            each = socket.socket()
            try:
                each.bind((address, port))
            except OSError:
                each.close()
                if port == 0:
                    raise
            else:
                sockets.append(each)
        return [int(each.getsockname()[1]) for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _candidates(count: int) -> list[int]:
    try:
        first, last = map(int, _OUTGOING.read_text().split())
    except (OSError, ValueError):  # another system
        return []
    quiet = [*range(_LOWEST, first), *range(last + 1, _HIGHEST + 1)]
    # Not the generator of any training seed: two runs of one seed on a machine must not choose the same ports.
    return random.SystemRandom().sample(quiet, 20 * count) if len(quiet) >= max(_ENOUGH, 20 * count) else []
