"""The distribution contains every room, and requires and pins what the rooms import."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOTS = {"copd_megatron": "copd_megatron", "copd_kernels": "kernels", "copd_launchers": "launchers"}
OPTIONAL = {"av", "transformer_engine", "apex", "sglang", "triton", "liger_kernel"}
PARTS = {"pydantic_core"}  # of pydantic, which requires the one version that fits


def _normal(requirement: str) -> str:
    """The distribution's name in a requirement, in its normal form."""
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def _modules_imported() -> set[str]:
    found = set()
    for folder in ROOTS.values():
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - set(ROOTS)


def test_every_room_is_in_the_distribution() -> None:
    rooms = {
        ".".join([name, *file.parent.relative_to(ROOT / folder).parts])
        for name, folder in ROOTS.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == rooms


def test_every_import_is_required() -> None:
    distributions = metadata.packages_distributions()
    required = {_normal(requirement) for requirement in PROJECT["project"]["dependencies"]}
    for module in _modules_imported() - OPTIONAL - PARTS:
        offered = {_normal(distribution) for distribution in distributions.get(module, [module])}
        assert offered & required, f"{module} is imported, but none of {offered} is in pyproject.toml's dependencies"


def test_every_requirement_of_the_cpu_environment_is_pinned_and_satisfied() -> None:
    from packaging.requirements import Requirement

    lines = (ROOT / "tools" / "constraints-cpu.txt").read_text().splitlines()
    pins = {_normal(line): line.split("==")[1] for line in lines if "==" in line}
    extras = PROJECT["project"]["optional-dependencies"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["bench"]]:
        requirement = Requirement(text)
        assert _normal(requirement.name) in pins, f"{requirement.name} has no pin"
        assert requirement.specifier.contains(pins[_normal(requirement.name)]), text
