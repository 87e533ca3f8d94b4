from __future__ import annotations

import pytest
import torch

from copd_kernels.choice import VARIABLE
from copd_kernels.device import launch


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton kernels run, on CPU tensors in the interpreter, with tiles small enough that a short row has
    several."""
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.setattr(launch, "BLOCK", 64)
    monkeypatch.setattr(launch, "LANES", dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), 128))
