"""Whole runs through `copd launch --slurm` on a real Slurm of two nodes: one branch on each."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from namespaces import ADDRESSES, Namespaces
from slurm_cluster import SlurmCluster, why_not
from tiny_run import Command, comparable

from copd_megatron.observe.events import read_events
from copd_megatron.observe.status_file import read_status

MISSING = why_not()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(MISSING is not None and not os.environ.get("COPD_SLURM"), reason=f"no Slurm here: {MISSING}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    assert MISSING is None, MISSING
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


LONGER = {"cycles": 1, "explore_steps": 8, "exchange_steps": 12}
"""Long enough to be stopped on the way, also by something that takes a second."""


class SlurmCommand(Command):
    """`copd launch --slurm` of the tiny configuration."""

    def __init__(self, folder: Path, base: Path, **changes: object) -> None:
        super().__init__(folder, base, **{"rhythm": LONGER, **changes})

    def launch(self, cluster: SlurmCluster, *overrides: str, status: int = 0) -> str:
        """What the command says; the number of the job is `self.job`."""
        result = subprocess.run(
            [
                *cluster.within["n1"],
                sys.executable,
                "-m",
                "copd_megatron.cli",
                "launch",
                str(self.config),
                "--slurm",
                *overrides,
            ],
            env=cluster.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == status, result.stdout + result.stderr
        if not status:
            self.job = json.loads((self.run / "slurm" / "job.json").read_text())["job"]
        return result.stdout + result.stderr

    def output(self) -> str:
        """What the batch script has said, in one line."""
        return " ".join(word for file in (self.run / "slurm").glob("*.out") for word in file.read_text().split())

    def until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not reached():
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.05)

    def finishes(self, cluster: SlurmCluster) -> None:
        """Until the job has ended, and well."""
        job = cluster.wait_for(self.job, {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}, 400)
        assert job["JobState"] == "COMPLETED", self.output()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, base: Path, cluster: SlurmCluster) -> SlurmCommand:
    """The tiny run on two nodes, never stopped."""
    command = SlurmCommand(tmp_path_factory.mktemp("whole"), base)
    command.launch(cluster)
    command.finishes(cluster)
    return command


def test_each_branch_runs_on_a_node_of_its_own(whole: SlurmCommand) -> None:
    assert len(whole.weights()) == 3
    assert (whole.run / "report.html").is_file()
    assert "checked 2 nodes: n1 127.0.0.1, n2 127.0.0.2" in (whole.run / "run.log").read_text()
    assert read_status(whole.run / "status.json").job == whole.job
    for name, node in {"text": "n1", "image": "n2"}.items():
        log = (whole.run / "branches" / name / "ranks" / "rank_0.txt").read_text()
        assert re.search(rf"gang {name}/\w+, rank 0 of 1 on {node}", log)


def test_a_preempted_run_saves_together_waits_and_ends_in_the_same_bits(
    tmp_path: Path, base: Path, cluster: SlurmCluster, whole: SlurmCommand
) -> None:
    command = SlurmCommand(tmp_path, base)
    command.launch(cluster)
    command.until(lambda: bool(command.checkpoints().steps()))
    cluster.preempt()
    command.until(lambda: cluster.job(command.job)["Restarts"] == "1")
    assert "all branches save step" in command.output()
    assert "ended with status 130" in command.output()
    assert read_status(command.run / "status.json").stage == "stopped"
    steps = command.checkpoints().steps()
    assert 1 < steps[-1] < 20
    assert f"job {command.job} of this run is still queued or running" in command.launch(cluster, status=1)
    command.finishes(cluster)
    assert f"continuing from step {steps[-1]}" in command.output()
    assert command.weights() == whole.weights()
    for name in ("text", "image"):
        assert comparable(command.lines(name)) == comparable(whole.lines(name))


@pytest.mark.slow
def test_a_run_on_two_nodes_ends_as_on_one_machine(tmp_path: Path, base: Path, whole: SlurmCommand) -> None:
    undisturbed = Command(tmp_path, base, rhythm=LONGER)
    status, output = undisturbed.finish()
    assert status == 0, output
    assert whole.weights() == undisturbed.weights()
    for name in ("text", "image"):
        assert comparable(whole.lines(name)) == comparable(undisturbed.lines(name))


@pytest.mark.slow
def test_a_gang_over_two_nodes_survives_scancel_and_requeue(tmp_path: Path, base: Path, cluster: SlurmCluster) -> None:
    alone = {
        "branches": [{"name": "text", "data": {"mini": {"modality": "text"}}, "parallel": {"world": 2}}],
        "topology": "none",
    }
    (tmp_path / "local").mkdir()
    (tmp_path / "slurm").mkdir()
    local = Command(tmp_path / "local", base, rhythm=LONGER, **alone)
    status, output = local.finish()
    assert status == 0, output
    command = SlurmCommand(tmp_path / "slurm", base, **alone, cluster={"nodes": 2, "interface": "lo"})
    command.launch(cluster)
    command.until(lambda: bool(command.checkpoints().steps()))
    cluster.command("scontrol", "requeue", command.job)  # nobody is asked, no time to save
    command.until(lambda: cluster.job(command.job)["JobState"] == "PENDING")
    command.finishes(cluster)
    assert "continuing from step" in command.output()
    assert command.weights() == local.weights()
    ranks = command.run / "branches" / "text" / "ranks"
    assert "rank 1 of 2 on n2" in (ranks / "rank_1.txt").read_text()


@pytest.mark.slow
def test_a_partition_between_two_nodes_for_twenty_seconds_does_no_harm(
    tmp_path: Path, base: Path, whole: SlurmCommand
) -> None:
    """Each node is a network namespace; the conductor and `text` are on one side, `image` on the other."""
    with Namespaces() as apart, SlurmCluster(tmp_path / "slurm", ADDRESSES, apart.within) as cluster:
        command = SlurmCommand(tmp_path, base)
        command.launch(cluster)
        command.until(lambda: any(line["step"] >= 2 for line in command.lines("image")))
        apart.cut(20.0)
        command.finishes(cluster)
    assert "checked 2 nodes: n1 10.77.0.1, n2 10.77.0.2" in (command.run / "run.log").read_text()
    assert [event for event in read_events(command.run) if event["kind"] == "failure"] == []
    assert command.weights() == whole.weights()
    for name in ("text", "image"):
        assert comparable(command.lines(name)) == comparable(whole.lines(name))


@pytest.mark.slow
def test_branches_on_different_kinds_of_nodes_are_a_heterogeneous_job(
    tmp_path: Path, base: Path, cluster: SlurmCluster, whole: SlurmCommand
) -> None:
    kinds = {"text": ["--nodelist=n2"], "image": ["--nodelist=n1"]}
    command = SlurmCommand(tmp_path, base, cluster={"node_options": kinds})
    command.launch(cluster)
    command.finishes(cluster)
    assert command.weights() == whole.weights()
    assert ", rank 0 of 1 on n2" in (command.run / "branches" / "text" / "ranks" / "rank_0.txt").read_text()


@pytest.mark.slow
def test_nodes_that_cannot_take_part_are_named_before_anything_starts(
    tmp_path: Path, base: Path, cluster: SlurmCluster
) -> None:
    command = SlurmCommand(tmp_path, base, cluster={"interface": "ib0"})
    command.launch(cluster)
    job = cluster.wait_for(command.job, {"COMPLETED", "FAILED"}, 200)
    assert job["JobState"] == "FAILED"
    assert "n1: no address on cluster.interface = ib0; its interfaces are lo" in command.output()
    assert "n2: no address on cluster.interface = ib0" in command.output()
    assert not (command.run / "branches").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_servers_are_steps_too_and_their_key_is_in_one_file_alone(
    tmp_path: Path, base: Path, cluster: SlurmCluster
) -> None:
    rollout = {"engine": "sglang", "max_new_tokens": 6, "sglang": {"transport": "broadcast"}}
    command = SlurmCommand(
        tmp_path, base, rollout=rollout, rhythm={"explore_steps": 2, "exchange_steps": 2, "cycles": 1}
    )
    command.launch(cluster)
    endpoints = command.run / "endpoints.json"
    command.until(endpoints.exists)
    entries = json.loads(endpoints.read_text())
    assert stat.S_IMODE(endpoints.stat().st_mode) == 0o600
    hosts = {entry["branch"]: entry["urls"][0].rpartition(":")[0] for entry in entries}
    assert hosts == {"text": "http://127.0.0.1", "image": "http://127.0.0.2", "base": "http://127.0.0.1"}
    key = entries[0]["key"].encode()
    holders = set()
    while cluster.job(command.job)["JobState"] == "RUNNING":
        holders |= holding(key, command.run, cluster.root)
        time.sleep(2)
    command.finishes(cluster)
    assert holders == {endpoints}
    assert not endpoints.exists()
    assert holding(key, command.run, cluster.root) == set()
    assert (command.run / "report.html").is_file()
    assert all(line["mismatch/kl"] < 1e-6 for line in command.lines("image") if "mismatch/kl" in line)


def holding(key: bytes, *folders: Path) -> set[Path]:
    """The files that have the key in them."""
    found = set()
    for file in (Path(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names):
        try:
            if file.is_file() and key in file.read_bytes():
                found.add(file)
        except OSError:  # gone meanwhile
            continue
    return found
