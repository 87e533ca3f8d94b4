"""The state of this process's random generators, as JSON.

What matters to training is drawn by generators named after their step (randomness.py). This is for what libraries may
draw from their default ones, so that they too go on where they stood.
"""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch

from copd_megatron.policy import platform

platform.prepare()

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # noqa: E402


def random_state() -> dict[str, Any]:
    """Python's, NumPy's and torch's default generators, the device's, and megatron-core's tensor-parallel ones."""
    version, numbers, spare = random.getstate()
    name, keys, *place = np.random.get_state(legacy=True)
    tracked = get_cuda_rng_tracker().get_states()
    return {
        "python": [version, _text(np.array(numbers, dtype=np.uint64).tobytes()), spare],
        "numpy": [name, _text(np.asarray(keys, dtype=np.uint32).tobytes()), *place],
        "torch": _text(torch.get_rng_state().numpy().tobytes()),
        "device": _text(torch.cuda.get_rng_state().numpy().tobytes()) if platform.on_gpu() else None,
        "tracker": {
            key: _text(state.cpu().numpy().tobytes()) for key, state in tracked.items() if torch.is_tensor(state)
        },
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Let this process's generators go on from a saved state."""
    version, numbers, spare = state["python"]
    random.setstate((version, tuple(np.frombuffer(_bytes(numbers), dtype=np.uint64).tolist()), spare))
    name, keys, *place = state["numpy"]
    np.random.set_state((name, np.frombuffer(_bytes(keys), dtype=np.uint32), *place))
    if platform.on_gpu() and state["device"] is not None:
        torch.cuda.set_rng_state(_tensor(state["device"]))
    if state["tracker"]:
        tracker = get_cuda_rng_tracker()
        tracker.set_states({**tracker.get_states(), **{key: _tensor(text) for key, text in state["tracker"].items()}})
    torch.set_rng_state(_tensor(state["torch"]))  # last: on a CPU the tracker works on this very generator


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(_bytes(text)), dtype=torch.uint8)
