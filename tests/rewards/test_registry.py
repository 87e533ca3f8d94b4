"""Verifiers are found by name, and nothing about them is slow to import."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from copd_megatron.errors import ConfigError
from copd_megatron.rewards import QUICK, known, verifier, verifier_names


def test_every_built_in_verifier_is_there() -> None:
    assert {"choice", "choice_or_math", "digits", "exact", "math", "number"} <= set(verifier_names())
    assert set(verifier_names()) > QUICK
    assert verifier("digits")("3852>18", "18") == 1.0


@pytest.mark.parametrize("look_up", [verifier, known])
def test_unknown_name_is_answered_with_the_nearest(look_up: object) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown verifier 'mathh'; did you mean 'math'\? known: choice, choice_or_math, digits"
    ):
        look_up("mathh")  # type: ignore[operator]


@pytest.mark.parametrize("name", ["os:system", "final", "__init__", "../math", ""])
def test_only_verifiers_can_be_named(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown verifier"):
        verifier(name)


def test_no_verifier_imports_torch() -> None:
    program = (
        "import sys\n"
        "from copd_megatron.rewards import verifier, verifier_names, pool\n"
        "assert 'math_verify' not in sys.modules\n"
        "[verifier(name) for name in verifier_names()]\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=60,
    )
