"""`python -m copd_megatron.cluster.node_report …`: one node says what it has, as a line of JSON.

The conductor runs it on every node before the first step (node_check.py). Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import struct
from pathlib import Path
from typing import Any

from copd_megatron import __version__
from copd_megatron.observe.gpu import GpuTelemetry
from copd_megatron.supervision.ports import free_ports

MARK = "node-report "
"""Begins the line, which stands among what else is printed when a process starts."""
TOKEN = ".node_check"
"""File in the run directory that shows that two nodes see the same one."""
_SIOCGIFADDR = 0x8915
"""ioctl(2): the IPv4 address of an interface (Linux)."""


def report(run_dir: Path, base: Path, interface: str | None, address: str | None, ports: int) -> dict[str, Any]:
    """What this node has. `address` is the one that it is known by, and counts where no `interface` is named."""
    telemetry = GpuTelemetry()
    gpus = len(telemetry.names())
    telemetry.close()
    if interface is not None:
        address = interface_address(interface)
    return {
        "node": os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        "copd": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "token": _read(run_dir / TOKEN),
        "base": (base / "config.json").is_file(),
        "gpus": gpus,
        "interfaces": [name for _, name in socket.if_nameindex()],
        "address": address,
        "ports": [] if address is None else ports_of(address, ports),
    }


def interface_address(interface: str) -> str | None:
    """The interface's IPv4 address; None if there is no such interface, or it has none."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(answer[20:24])


def ports_of(address: str, count: int) -> list[int] | None:
    """Free ports of `address`; None if this node has no such address."""
    try:
        return free_ports(address, max(count, 1))[:count]
    except OSError:
        return None


def _read(file: Path) -> str | None:
    try:
        return file.read_text()
    except OSError:
        return None


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--interface")
    parser.add_argument("--addresses", default="{}", help="JSON: each node's address")
    parser.add_argument("--ports", type=int, default=0, help="how many free ports to look for")
    given = parser.parse_args()
    known = json.loads(given.addresses).get(os.environ.get("SLURMD_NODENAME", ""))
    found = report(given.run_dir, given.base, given.interface, known, given.ports)
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
