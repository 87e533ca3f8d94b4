"""Which implementation runs: Triton on CUDA, the references everywhere else.

The environment variable `COPD_KERNELS` overrides it: `reference` runs the references on any device, `triton` the
kernels also on CPU tensors, which needs Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is first
imported).
"""

from __future__ import annotations

import os

import torch

VARIABLE = "COPD_KERNELS"
FORMATS = (torch.bfloat16, torch.float16, torch.float32)
"""Logits that the kernels read; float64 is for the references."""


def on_triton(logits: torch.Tensor) -> bool:
    """Whether the kernels run on `logits`. Raises ValueError for an unknown `COPD_KERNELS`."""
    wanted = os.environ.get(VARIABLE, "auto")
    if wanted not in ("auto", "triton", "reference"):
        raise ValueError(f"{VARIABLE} is {wanted!r}; expected auto, triton or reference")
    if wanted == "reference" or logits.dtype not in FORMATS:
        return False
    return wanted == "triton" or logits.is_cuda
