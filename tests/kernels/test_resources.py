"""The compile gate: one configuration of each kernel here; all of them are `python -m copd_kernels.resources`."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest

from copd_kernels.device import launch
from copd_kernels.device.shipped import configurations
from copd_kernels.resources import TABLE, grown

KERNELS = ("topk", "partition_sums", "partition_gradient", "topk_kl", "token_kl", "scale_rows")
TABLE_NOW = json.loads(TABLE.read_text())


def test_the_table_holds_every_configuration_and_no_other():
    names = [chosen.name for chosen in configurations()]
    assert len(names) == len(set(names)) > 80
    assert {name.split()[0] for name in names} == set(KERNELS)
    assert {architecture: set(kernels) for architecture, kernels in TABLE_NOW.items()} == {
        "sm_90": set(names),
        "sm_100": set(names),
    }


def test_nothing_in_the_table_spills_or_is_too_large_to_run():
    for architecture, kernels in TABLE_NOW.items():
        for name, usage in kernels.items():
            assert usage["spilled"] == 0, (architecture, name)
            assert usage["registers"] <= launch.REGISTERS, (architecture, name)
            assert usage["shared"] <= 227 * 1024, (architecture, name)


def test_growth_spills_and_unknown_kernels_are_named():
    assert grown(TABLE_NOW, TABLE_NOW) == []
    name = "topk bf16 overlap"
    for measure, factor, message in (("registers", 1.2, "more than 15%"), ("shared", 1.2, "more than 15%")):
        found = copy.deepcopy(TABLE_NOW)
        found["sm_90"][name][measure] = int(factor * found["sm_90"][name][measure])
        (problem,) = grown(found, TABLE_NOW)
        assert problem.startswith(f"sm_90 {name}: {measure}")
        assert message in problem
    found = copy.deepcopy(TABLE_NOW)
    found["sm_100"][name]["spilled"] = 4
    assert grown(found, TABLE_NOW) == [f"sm_100 {name}: 4 bytes of registers spilled, expected none"]
    (problem,) = grown({"sm_90": {"new": TABLE_NOW["sm_90"][name]}}, TABLE_NOW)
    assert "not in resources.json" in problem
    slack = copy.deepcopy(TABLE_NOW)
    slack["sm_90"][name]["registers"] = int(1.1 * slack["sm_90"][name]["registers"])
    assert grown(slack, TABLE_NOW) == []


@pytest.mark.parametrize("kernel", ["topk bf16 overlap", "topk_kl bf16 reverse"])
def test_a_kernel_compiles_without_a_gpu(kernel):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "copd_kernels.resources", "--only", kernel, "--jobs", "1"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {line[0] for line in lines} == {"sm_90", "sm_100"}
    assert all(line[-2:] == ["spilled", "0"] for line in lines)


def test_the_interpreter_is_no_compiler():
    command = [sys.executable, "-m", "copd_kernels.resources"]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr
