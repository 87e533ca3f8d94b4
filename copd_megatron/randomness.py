"""Every random choice has a name. Seeds are derived from the run's seed and that name, so that a choice depends on
where it stands (branch, step, purpose) and not on what was drawn before it: resuming needs only the step number."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def seed_for(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the choice called `names` in a run with this `seed`."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A torch generator for the choice called `names`."""
    import torch

    return torch.Generator().manual_seed(seed_for(seed, *names))
