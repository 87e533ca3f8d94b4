"""The servers of a run as processes: what they are told, who may read their key, and what happens when they end."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import ValidationError

from copd_megatron.cluster.site import OneMachine
from copd_megatron.config import RunConfig
from copd_megatron.config.engines import KEY_VARIABLE
from copd_megatron.errors import CopdError
from copd_megatron.rollout.sglang.endpoints import read_endpoints
from copd_megatron.rollout.sglang.fleet import Fleet, ServerProcess
from copd_megatron.run_folder import RunFolder


def config(**changes: Any) -> RunConfig:
    content: dict[str, Any] = {
        "base": "a folder",
        "branches": [
            {"name": "text", "data": {"mini": {"modality": "text"}}},
            {"name": "image", "data": {"mini": {"modality": "image"}}},
        ],
        "rollout": {"engine": "sglang"},
    }
    rollout = {**content["rollout"], **changes.pop("rollout", {})}
    return RunConfig.model_validate({**content, **changes, "rollout": rollout})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def start_of(settings: RunConfig, folder: RunFolder) -> Fleet:
    return Fleet(settings, folder, OneMachine(settings, folder))


def argument(process: ServerProcess, name: str) -> str:
    return process.command[process.command.index(f"--{name}") + 1]


def test_each_branch_and_the_base_get_servers_with_a_key_that_only_their_user_can_read(folder: RunFolder) -> None:
    fleet = start_of(config(rollout={"sglang": {"servers": 2}}), folder)
    assert [process.branch for process in fleet.processes] == ["text", "text", "image", "image", "base", "base"]
    assert stat.S_IMODE(folder.endpoints.stat().st_mode) == 0o600
    endpoints = read_endpoints(folder.endpoints)
    assert endpoints["base"].fixed
    assert not endpoints["text"].fixed
    urls = [url for name in ("text", "image", "base") for url in endpoints[name].urls]
    assert urls == [process.url for process in fleet.processes]
    assert len(set(urls)) == 6
    assert urls == [f"http://127.0.0.1:{argument(process, 'port')}" for process in fleet.processes]
    key = endpoints["text"].key
    assert key
    assert len(key) > 30
    for process in fleet.processes:
        assert process.environment[KEY_VARIABLE] == key
        assert not any(key in word for word in process.command), "everybody can read a command"
        assert argument(process, "model-path") == "a folder"
        assert argument(process, "host") == "127.0.0.1"
        assert "--trust-remote-code" not in process.command
    assert read_endpoints(run_again(folder))["text"].run != endpoints["text"].run
    fleet.stop()
    assert not folder.endpoints.exists()


def run_again(folder: RunFolder) -> Path:
    start_of(config(), folder)
    return folder.endpoints


def test_weights_have_names_of_their_own_but_for_the_base(folder: RunFolder) -> None:
    start_of(config(), folder)
    endpoints = read_endpoints(folder.endpoints)
    labels = {endpoints[name].label(version) for name in ("text", "image") for version in (3, 4)}
    assert len(labels) == 4
    assert endpoints["base"].label(0) == endpoints["base"].label(5) == "default"


def test_servers_that_are_already_there_are_not_started(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = {name: [f"http://10.0.0.1:{port}"] for port, name in enumerate(["text", "image", "base"], 30000)}
    key = tmp_path / "key"
    key.write_text("from a file\n")
    fleet = start_of(config(rollout={"sglang": {"urls": urls, "api_key_file": str(key)}}), folder)
    assert fleet.processes == []
    assert read_endpoints(folder.endpoints)["image"].urls == ("http://10.0.0.1:30001",)
    assert read_endpoints(folder.endpoints)["image"].key == "from a file"
    monkeypatch.setenv(KEY_VARIABLE, "from the environment")
    start_of(config(rollout={"sglang": {"urls": urls}}), folder)
    assert read_endpoints(folder.endpoints)["image"].key == "from the environment"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"temperature": 0.7}}, r"SGLang scores given tokens at 1\.0 only"),
        ({"rollout": {"sglang": {"host": "0.0.0.0"}}}, "lets anybody in"),
        ({"rollout": {"sglang": {"args": {"trust-remote-code": True}}}}, "args.trust-remote-code: not to be given"),
        ({"rollout": {"sglang": {"args": {"trust_remote_code": True}}}}, "not to be given"),
        ({"rollout": {"sglang": {"args": {"--mem": 1}}}}, "args.--mem: not to be given"),
        ({"rollout": {"sglang": {"urls": {"text": ["http://a:1"]}}}}, "no servers for image, base"),
        ({"rollout": {"sglang": {"urls": {"text": ["10.0.0.1:1"]}}}}, "must look like http://"),
        (
            {"rollout": {"sglang": {"urls": {n: ["http://a:1"] for n in ("text", "image", "base", "video")}}}},
            "video is none of text, image, base",
        ),
        (
            {
                "rollout": {"sglang": {"urls": {n: ["http://a:1"] for n in ("text", "image", "base", "text/frozen")}}},
                "teacher": {"refresh": "phase"},
            },
            "no servers for image/frozen",
        ),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**changes)


def test_teachers_of_a_phase_have_servers_of_their_own(folder: RunFolder) -> None:
    one_way = config(teacher={"refresh": "phase"}, topology=[{"student": "image", "teacher": "text"}])
    fleet = start_of(one_way, folder)
    assert [process.branch for process in fleet.processes] == ["text", "image", "text/frozen", "base"]
    assert len({process.log for process in fleet.processes}) == 4
    endpoints = read_endpoints(folder.endpoints)
    assert endpoints["text/frozen"].label(3) != endpoints["text"].label(3)


def test_without_a_base_server_the_base_needs_no_address() -> None:
    urls = {"text": ["http://a:1"], "image": ["http://a:2"]}
    config(rollout={"sglang": {"urls": urls}}, log={"kl_to_base": False})


@pytest.fixture
def make_fleet(folder: RunFolder) -> Any:
    """`make_fleet(program, max_restarts)`: a fleet of one server that is the Python `program`."""
    made: list[Fleet] = []

    def make(program: str, max_restarts: int) -> tuple[Fleet, ServerProcess]:
        fleet = start_of(config(rollout={"sglang": {"max_restarts": max_restarts}}), folder)
        fleet.processes = fleet.processes[:1]
        fleet.processes[0].command = [sys.executable, "-c", program]
        made.append(fleet)
        fleet.start()
        return fleet, fleet.processes[0]

    yield make
    for fleet in made:
        fleet.stop()


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_a_server_that_dies_is_started_again_so_often_and_no_more(make_fleet: Any) -> None:
    fleet, process = make_fleet("print('no GPU here'); raise SystemExit(3)", max_restarts=2)
    for _ in range(2):
        assert until(fleet.watch) == ["a server of branch text died (exit status 3); started again"]
    with pytest.raises(CopdError, match=r"(?s)has died 3 times, at last with exit status 3.*no GPU here"):
        until(fleet.watch)
    assert process.starts == 3


def test_a_server_that_hangs_is_started_again_once(make_fleet: Any) -> None:
    fleet, process = make_fleet("import time; time.sleep(600)", max_restarts=3)
    assert fleet.watch(hung=[process.url]) == [], "it has not been there long enough to have hung"
    process.started -= 1000
    assert fleet.watch(hung=["http://127.0.0.1:9", process.url, process.url]) == [
        "a server of branch text hangs; killed",
        "a server of branch text died (exit status -9); started again",
    ]
    assert process.ended() is None
    assert fleet.watch(hung=[process.url]) == [], "another branch tells of the same"
    assert process.starts == 2


def test_a_fleet_ends_with_everything_that_it_has_started(make_fleet: Any, tmp_path: Path) -> None:
    note = tmp_path / "child"
    fleet, _ = make_fleet(
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(note)!r} + '.tmp', 'w').write(str(child.pid))\n"
        f"os.rename({str(note)!r} + '.tmp', {str(note)!r})\n"
        "time.sleep(600)\n",
        max_restarts=0,
    )
    until(note.exists)
    child = int(note.read_text())
    assert psutil.pid_exists(child)
    assert fleet.watch() == []
    fleet.stop()
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE)


def test_the_file_of_endpoints_is_refused_when_it_is_damaged(folder: RunFolder) -> None:
    start_of(config(), folder)
    content = folder.endpoints.read_text()
    folder.endpoints.write_text(content[: len(content) // 2])
    with pytest.raises(CopdError, match="cannot be read as the list of the run's servers"):
        read_endpoints(folder.endpoints)
    os.unlink(folder.endpoints)
    with pytest.raises(CopdError, match="No such file"):
        read_endpoints(folder.endpoints)
