"""Whole runs on real servers: one per branch, and one that keeps the base."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from tiny_run import Command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SERVERS = {"engine": "sglang", "max_new_tokens": 6}
UPDATES = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Command:
    """A run in which nothing happens."""
    command = Command(tmp_path_factory.mktemp("undisturbed"), base, rollout=SERVERS)
    status, output = command.finish(timeout=800)
    assert status == 0, output
    return command


def servers_of(command: Command, branch: str) -> list[psutil.Process]:
    """The processes of the branch's server, its first one at the end."""
    entries = json.loads((command.run / "endpoints.json").read_text())
    port = next(entry["urls"][0] for entry in entries if entry["branch"] == branch).rsplit(":", 1)[1]
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if "copd_megatron.rollout.sglang.serve" in line and port in line:
            return [*process.children(recursive=True), process]
    return []


def kill_server(command: Command, branch: str) -> None:
    victims = servers_of(command, branch)
    assert victims, "the server does not run"
    for victim in victims:
        os.kill(victim.pid, signal.SIGKILL)


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def values(command: Command, branch: str, key: str) -> list[float]:
    return [line[key] for line in command.lines(branch) if key in line]


def events(command: Command, branch: str, name: str) -> int:
    return sum(line.get(f"count/{name}", 0) for line in command.lines(branch))


def test_the_whole_job_runs_on_servers(undisturbed: Command) -> None:
    for branch in ("text", "image"):
        lines = undisturbed.lines(branch)
        updates = [line for line in lines if line["phase"] in ("explore", "exchange")]
        assert [line["step"] for line in updates] == list(range(1, UPDATES + 1))
        assert all(line["mismatch/kl"] < 1e-6 for line in updates), "engine and trainer disagree"
        probes = [line for line in lines if line["phase"] == "probe"]
        peer = {"text": "image", "image": "text"}[branch]
        assert probes[0][f"overlap/{peer}"] == 1.0
        assert probes[0][f"symkl/{peer}"] < 1e-8, "branches start as the same model"
        assert probes[-1]["kl_to_base"] > 0
    assert (undisturbed.run / "merged" / "config.json").is_file()
    assert (undisturbed.run / "report.html").is_file()
    assert not (undisturbed.run / "endpoints.json").exists(), "the key outlives the run"
    assert not [
        p for p in psutil.process_iter(["cmdline"]) if str(undisturbed.run) in " ".join(p.info["cmdline"] or [])
    ]


@pytest.mark.parametrize(("branch", "phase"), [("text", "explore"), ("image", "exchange")])
def test_a_killed_server_is_replaced_and_nothing_is_lost(
    tmp_path: Path, base: Path, undisturbed: Command, branch: str, phase: str
) -> None:
    command = Command(tmp_path, base, rollout=SERVERS)
    process = command.start()
    first = 2 if phase == "explore" else 4
    command.wait_for(process, branch, lambda lines: any(line["step"] >= first for line in lines))
    kill_server(command, branch)
    status, output = command.finish(process, timeout=800)
    assert status == 0, output
    assert f"a server of branch {branch} died" in output
    for name in ("text", "image"):
        steps = [line["step"] for line in command.lines(name) if line["phase"] in ("explore", "exchange")]
        assert steps == list(range(1, UPDATES + 1))
        for key in ("rollout/length", "reward/mean"):
            assert values(command, name, key) == values(undisturbed, name, key)
        # Not to the bit: what else is in a server's batch decides how its matrix products are rounded.
        assert values(command, name, "grad_norm") == pytest.approx(values(undisturbed, name, "grad_norm"), rel=1e-2)
    lost = sum(events(command, name, f"{owner}_lost") for name in ("text", "image") for owner in ("engine", "teacher"))
    assert lost >= 1


def test_a_server_that_dies_again_and_again_stops_the_run_and_the_command_goes_on(tmp_path: Path, base: Path) -> None:
    command = Command(tmp_path, base, rollout={**SERVERS, "sglang": {"max_restarts": 0}})
    process = command.start()
    command.wait_for(process, "text", lambda lines: bool(command.checkpoints().steps()))
    kill_server(command, "image")
    status, output = command.finish(process, timeout=600)
    assert status == 1
    assert "a server of branch 'image' has died 1 times" in output
    assert "server_0.log" in output
    status, output = command.finish(timeout=800)
    assert status == 0, output
    assert "continuing from step" in output


def test_a_server_that_hangs_is_replaced(tmp_path: Path, base: Path, undisturbed: Command) -> None:
    command = Command(tmp_path, base, rollout={**SERVERS, "sglang": {"hang_seconds": 15}})
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 3 for line in lines))
    for victim in servers_of(command, "image"):
        os.kill(victim.pid, signal.SIGSTOP)
    status, output = command.finish(process, timeout=800)
    assert status == 0, output
    assert "a server of branch image hangs; killed" in output
    for name in ("text", "image"):
        assert values(command, name, "reward/mean") == values(undisturbed, name, "reward/mean")


def test_a_teacher_that_stays_away_stops_the_run_at_a_checkpoint(tmp_path: Path, base: Path) -> None:
    """It says nothing, and nobody takes it for hung before the wait for peers is over."""
    limits = {"request_seconds": 20, "attempts": 2, "start_seconds": 40, "hang_seconds": 10_000}
    command = Command(tmp_path, base, rollout={**SERVERS, "sglang": limits}, teacher={"wait_seconds": 60})
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 3 for line in lines))
    for victim in servers_of(command, "image"):
        os.kill(victim.pid, signal.SIGSTOP)
    started = time.monotonic()
    status, output = command.finish(process, timeout=800)
    assert status == 1
    assert time.monotonic() - started < 700
    assert "continues from step" in output


def test_teachers_of_a_phase_survive_their_servers_and_the_run(tmp_path: Path, base: Path) -> None:
    """The server that keeps what `image` knew is killed, then the whole run is interrupted in Phase II and goes on."""
    changes = {
        "rollout": SERVERS,
        "teacher": {"refresh": "phase"},
        "log": {"overlap_k": 5, "probe_every": 20, "probe_prompts": 4, "tensorboard": False, "kl_to_base": False},
        "rhythm": {"cycles": 1, "explore_steps": 1, "exchange_steps": 8},
    }
    calm = Command(made(tmp_path / "calm"), base, **changes)
    status, output = calm.finish(timeout=800)
    assert status == 0, output
    command = Command(made(tmp_path / "rough"), base, **changes)
    process = command.start()
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 2 for line in lines))
    kill_server(command, "image/frozen")
    command.wait_for(process, "text", lambda lines: any(line["step"] >= 4 for line in lines))
    process.send_signal(signal.SIGINT)
    status, output = command.finish(process, timeout=800)
    assert "a server of branch image/frozen died" in output
    assert "the same command continues from step" in output
    status, output = command.finish(timeout=800)
    assert status == 0, output
    for name in ("text", "image"):
        assert values(command, name, "reward/mean") == values(calm, name, "reward/mean")
        assert values(command, name, "opd/kl") == pytest.approx(values(calm, name, "opd/kl"), rel=1e-2)
