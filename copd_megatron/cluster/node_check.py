"""Before the first step: does every node see the same run, the same software and the GPUs that it should have?"""

from __future__ import annotations

import json
import logging
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copd_megatron.cluster.node_report import MARK, TOKEN, report
from copd_megatron.errors import CopdError

log = logging.getLogger(__name__)

_PATIENCE_SECONDS = 600.0
"""Longest wait for all nodes: the first Python on a cold file system takes minutes."""


@dataclass(frozen=True)
class Node:
    """A node that can take part: the address that others reach it by, and free ports there."""

    address: str
    ports: tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """What every node must have."""

    run_dir: Path
    base: Path
    interface: str | None
    gpus: int

    def arguments(self, addresses: Mapping[str, str], ports: int) -> list[str]:
        """Those of `node_report`."""
        words = ["--run-dir", str(self.run_dir.absolute()), "--base", str(self.base.absolute()), "--ports", str(ports)]
        if self.interface is not None:
            return [*words, "--interface", self.interface]
        return [*words, "--addresses", json.dumps(addresses)]


def check_nodes(
    commands: Mapping[tuple[str, ...], Sequence[str]], wanted: Wanted, environment: Mapping[str, str]
) -> dict[str, Node]:
    """The nodes by name, each of `commands` having been run for those that it stands for. Raises CopdError that says,
    node by node, what is wrong and what to do about it."""
    token = secrets.token_hex(8)
    (wanted.run_dir / TOKEN).write_text(token)
    try:
        said: dict[str, dict[str, Any]] = {}
        problems = []
        for nodes, command in commands.items():
            reports, rest = _ask(command, environment)
            said |= reports
            if silent := [node for node in nodes if node not in reports]:
                problems.append(
                    f"{', '.join(silent)}: no answer; is this Python and copd-megatron on a file system that the nodes "
                    f"share? What was said: {rest or 'nothing'}"
                )
        here = report(wanted.run_dir, wanted.base, None, None, 0)
        for node, found in sorted(said.items()):
            problems += [f"{node}: {problem}" for problem in _problems(found, here, token, wanted)]
        if problems:
            raise CopdError("nodes of this job cannot take part:\n  " + "\n  ".join(problems))
    finally:
        (wanted.run_dir / TOKEN).unlink(missing_ok=True)
    log.info("checked %d nodes: %s", len(said), ", ".join(f"{node} {said[node]['address']}" for node in sorted(said)))
    return {node: Node(found["address"], tuple(found["ports"])) for node, found in said.items()}


def _ask(command: Sequence[str], environment: Mapping[str, str]) -> tuple[dict[str, dict[str, Any]], str]:
    """What nodes have reported, and the last lines of whatever else was printed."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, env=dict(environment), check=False
        )
        output, complaint = result.stdout, result.stderr
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        complaint = f"not all nodes have answered within {_PATIENCE_SECONDS:g} s"
    lines = output.splitlines()
    reports = [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)]
    rest = [line for line in [*lines, *complaint.splitlines()] if not line.startswith(MARK)]
    return {entry["node"]: entry for entry in reports}, " | ".join(rest[-5:])


def _problems(found: Mapping[str, Any], here: Mapping[str, Any], token: str, wanted: Wanted) -> list[str]:
    problems = []
    for what, key in {"copd-megatron": "copd", "Python": "python"}.items():
        if found[key] != here[key]:
            problems.append(f"{what} {found[key]}, the conductor has {here[key]}; install the same on all nodes")
    if found["token"] != token:
        problems.append(
            f"it does not see the run directory {wanted.run_dir.absolute()}; put run_dir on a file system that all "
            "nodes share" + (" and mount it (cluster.container.mounts)" if found["token"] is None else "")
        )
    if not found["base"]:
        problems.append(f"it does not see the base {wanted.base.absolute()}; put it on a file system that all share")
    if found["gpus"] < wanted.gpus:
        problems.append(
            f"{found['gpus']} GPUs, cluster.gpus_per_node = {wanted.gpus}; ask for them (cluster.options) or take the "
            "node out of the job (cluster.options: --exclude)"
        )
    if found["address"] is None and wanted.interface is not None:
        known = ", ".join(found["interfaces"])
        problems.append(f"no address on cluster.interface = {wanted.interface}; its interfaces are {known}")
    elif found["ports"] is None or found["address"] is None:
        problems.append(f"it has no address {found['address']}, which Slurm knows it by; set cluster.interface")
    return problems
