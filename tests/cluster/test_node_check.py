"""What is said when nodes are not fit, with canned answers in the place of srun's."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from copd_megatron.cluster import node_report
from copd_megatron.cluster.node_check import Node, Wanted, check_nodes
from copd_megatron.errors import CopdError

Check = Callable[..., dict[str, Node]]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """`check(key=value, …)`: nodes n1 and n2, the second of which reports something else than it has."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")

    def run(interface: str | None = None, wanted: int = 0, silent: bool = False, **changes: Any) -> dict[str, Node]:
        needs = Wanted(tmp_path, base, interface, wanted)
        (tmp_path / node_report.TOKEN).write_text("TOKEN")
        first, second = (
            {**node_report.report(tmp_path, base, interface, address, 2), "node": node}
            for node, address in {"n1": "127.0.0.1", "n2": "127.0.0.2"}.items()
        )
        said = [first] if silent else [first, {**second, **changes}]
        (tmp_path / "said").write_text("".join(f"{node_report.MARK}{json.dumps(entry)}\n" for entry in said))
        complaint = "echo srun: error: n2: unreachable >&2"
        command = f"sed s/TOKEN/$(cat {tmp_path / node_report.TOKEN})/ {tmp_path / 'said'}; {complaint}"
        return check_nodes({("n1", "n2"): ["bash", "-c", command]}, needs, os.environ)

    return run


def test_fit_nodes_have_addresses_and_free_ports(check: Check, tmp_path: Path) -> None:
    nodes = check()
    assert {name: node.address for name, node in nodes.items()} == {"n1": "127.0.0.1", "n2": "127.0.0.2"}
    assert all(len(set(node.ports)) == 2 for node in nodes.values())
    assert check(interface="lo")["n2"].address == "127.0.0.1"
    assert not (tmp_path / node_report.TOKEN).exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"silent": True}, "n2: no answer; is this Python .* share[?] What was said: srun: error: n2: unreachable"),
        ({"copd": "0.0.9"}, r"n2: copd-megatron 0\.0\.9, the conductor has .*install the same on all nodes"),
        ({"python": "3.9"}, r"n2: Python 3\.9, the conductor has"),
        ({"token": None}, "n2: it does not see the run directory .* put run_dir on a file system that all nodes share"),
        ({"token": "of another folder"}, "n2: it does not see the run directory"),
        ({"base": False}, "n2: it does not see the base"),
        ({"gpus": 7, "wanted": 8}, r"n2: 7 GPUs, cluster\.gpus_per_node = 8; ask for them"),
        ({"ports": None}, r"n2: it has no address 127\.0\.0\.2, which Slurm knows it by; set cluster\.interface"),
    ],
)
def test_an_unfit_node_is_named_with_what_to_do(check: Check, given: dict[str, Any], message: str) -> None:
    with pytest.raises(CopdError, match=message):
        check(**given)


def test_a_node_reports_by_itself(tmp_path: Path) -> None:
    wanted = Wanted(tmp_path, tmp_path, "lo", 0)
    command = [sys.executable, "-m", "copd_megatron.cluster.node_report", *wanted.arguments({}, 1)]
    with pytest.raises(CopdError, match="n1: it does not see the base") as error:
        check_nodes({("n1",): command}, wanted, {**os.environ, "SLURMD_NODENAME": "n1"})
    assert len(str(error.value).splitlines()) == 2, "nothing else is wrong"


def test_an_interface_that_is_not_there_is_named_with_those_that_are(check: Check) -> None:
    with pytest.raises(CopdError) as error:
        check(interface="ib0")
    lines = re.findall(r"(n\d): no address on cluster\.interface = ib0; its interfaces are .*\blo\b", str(error.value))
    assert lines == ["n1", "n2"]


def test_an_address_of_another_machine_is_not_bound() -> None:
    assert node_report.ports_of("192.0.2.1", 1) is None
    assert node_report.interface_address("lo") == "127.0.0.1"
