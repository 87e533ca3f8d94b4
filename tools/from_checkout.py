"""Importing this makes the project importable from the checkout around this file, where it is not installed: a GPU host
without a package registry has what is copied to it and no more."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _importable(name: str, folder: Path) -> None:
    """Let `import name` find the package in `folder`, unless there is one already."""
    if importlib.util.find_spec(name) is not None:
        return
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder} is no package; run the tool from a whole checkout")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_importable("copd_kernels", ROOT / "kernels")
_importable("copd_megatron", ROOT / "copd_megatron")
