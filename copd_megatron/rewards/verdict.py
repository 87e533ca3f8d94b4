"""What judging a response can come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from copd_megatron.errors import CopdError

Status = Literal["ok", "unparsable", "timeout", "error"]


class Unparsable(ValueError):
    """No answer can be read from a response."""


class RewardError(CopdError):
    """Responses cannot be judged at all: a verifier cannot be loaded or its processes do not start."""


@dataclass(frozen=True)
class Verdict:
    """A reward in [0, 1] and how it came about; 0 unless `status` is "ok", and `reason` then says why."""

    reward: float
    status: Status
    reason: str = ""
