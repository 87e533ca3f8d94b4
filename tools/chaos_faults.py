"""Faults for `chaos.py`: each does one harmful thing to a tiny run that is under way."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from tiny_run import Command

OUTAGE_SECONDS = 20.0


class Target:
    """A run that is under way: its command, its conductor, and a random generator that draws who is hit."""

    def __init__(self, command: Command, conductor: subprocess.Popen[str], draw: random.Random) -> None:
        self.command = command
        self.conductor = conductor
        self.draw = draw

    def ranks(self) -> list[psutil.Process]:
        """Every rank of every branch."""
        return _processes("copd_megatron.worker", str(self.command.run))

    def rank(self) -> psutil.Process:
        """One of them."""
        return self.draw.choice(sorted(self.ranks(), key=lambda process: process.pid))

    def switchboard(self) -> psutil.Process:
        """The process that branches talk through."""
        return _processes("copd_megatron.supervision.switchboard", str(self.command.run))[0]

    def server(self) -> list[psutil.Process]:
        """All processes of one branch's server."""
        entries = json.loads((self.command.run / "endpoints.json").read_text())
        port = self.draw.choice([entry["urls"][0] for entry in entries]).rsplit(":", 1)[1]
        first = _processes("copd_megatron.rollout.sglang.serve", port)[0]
        return [*first.children(recursive=True), first]


def _processes(*words: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if all(word in line for word in words):
            found.append(process)
    if not found:
        raise ProcessLookupError(f"no process has {', '.join(words)} on its command line")
    return found


def kill_rank(target: Target) -> None:
    """kill -9 of a rank"""
    target.rank().kill()


def stop_rank(target: Target) -> None:
    """SIGSTOP of a rank, for good"""
    target.rank().suspend()


def kill_conductor(target: Target) -> None:
    """kill -9 of the conductor"""
    target.conductor.kill()


def stop_conductor(target: Target) -> None:
    """SIGSTOP of the conductor for 20 s"""
    target.conductor.send_signal(signal.SIGSTOP)
    time.sleep(OUTAGE_SECONDS)
    target.conductor.send_signal(signal.SIGCONT)


def kill_switchboard(target: Target) -> None:
    """kill -9 of the store that branches talk through"""
    target.switchboard().kill()


def stop_switchboard(target: Target) -> None:
    """SIGSTOP of that store, for good"""
    target.switchboard().suspend()


def kill_server(target: Target) -> None:
    """kill -9 of an SGLang server"""
    for process in target.server():
        process.kill()


def stop_server(target: Target) -> None:
    """SIGSTOP of an SGLang server, for good"""
    for process in target.server():
        process.suspend()


def fill_disk(target: Target) -> None:
    """the run's disk full, for good"""
    with open(target.command.run.parent / "ballast", "ab") as file:
        size = 1 << 20
        while size:
            try:
                os.write(file.fileno(), bytes(size))
            except OSError:
                size //= 2


def truncate_checkpoint(target: Target) -> None:
    """a file of the newest checkpoint cut in half, then kill -9 of a rank"""
    parts: list[Path] = []
    while not parts:
        steps = target.command.checkpoints().steps()
        parts = (
            sorted(target.command.run.glob(f"branches/*/checkpoints/step_{steps[-1]:07d}/*.distcp")) if steps else []
        )
        time.sleep(0.01)
    victim = target.draw.choice(parts)
    os.truncate(victim, victim.stat().st_size // 2)
    kill_rank(target)


def drop_connection(target: Target) -> None:
    """a rank's TCP connection to the store reset"""
    connections = [
        (connection.laddr.port, connection.raddr.port)
        for rank in target.ranks()
        for connection in rank.net_connections("tcp")
        if connection.raddr and connection.raddr.port == _port_of(target.switchboard())
    ]
    own, port = target.draw.choice(sorted(connections))
    filters = ["state", "established", "sport", "=", f":{own}", "dport", "=", f":{port}"]
    subprocess.run(["ss", "-K", *filters], check=True, capture_output=True)


def _port_of(process: psutil.Process) -> int:
    return next(
        int(connection.laddr.port) for connection in process.net_connections("tcp") if connection.status == "LISTEN"
    )


def partition(target: Target) -> None:
    """the network between processes gone for 20 s"""
    inside = ["nsenter", "--net", "--target", str(target.conductor.pid), "ip", "link", "set", "lo"]
    subprocess.run([*inside, "down"], check=True)
    time.sleep(OUTAGE_SECONDS)
    subprocess.run([*inside, "up"], check=True)


Fault = Callable[[Target], None]

ON_EMBEDDED: tuple[Fault, ...] = (
    kill_rank,
    stop_rank,
    kill_conductor,
    stop_conductor,
    kill_switchboard,
    stop_switchboard,
    fill_disk,
    truncate_checkpoint,
    drop_connection,
    partition,
)
ON_SERVERS: tuple[Fault, ...] = (kill_server, stop_server)
