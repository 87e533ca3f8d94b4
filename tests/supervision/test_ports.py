"""Ports of servers that begin to listen later."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from copd_megatron.supervision import ports
from copd_megatron.supervision.ports import free_ports


def test_they_differ_are_free_and_never_given_to_outgoing_connections() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    found = free_ports("127.0.0.1", 20)
    assert len(set(found)) == 20
    assert not any(first <= port <= last for port in found)
    for port in found:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))


def test_ports_in_use_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as busy, socket.socket() as idle:
        for each in (busy, idle):
            each.bind(("127.0.0.1", 0))
        taken, free = busy.getsockname()[1], idle.getsockname()[1]
        idle.close()
        monkeypatch.setattr(ports, "_candidates", lambda count: [taken, free])
        assert free_ports("127.0.0.1", 1) == [free]


def test_any_free_port_will_do_where_the_system_may_use_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    everything = tmp_path / "range"
    everything.write_text("1024\t65535\n")
    monkeypatch.setattr(ports, "_OUTGOING", everything)
    assert len(set(free_ports("127.0.0.1", 3))) == 3


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match=r"assign|address"):
        free_ports("192.0.2.1", 1)
