"""What a branch says about itself while it runs: small, frozen, sent as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, get_args

from copd_megatron.errors import CopdError

State = Literal[
    "starting", "rollout", "score", "train", "sync", "wait", "probe", "checkpoint", "eval", "done", "failed"
]
STATES: tuple[State, ...] = get_args(State)


@dataclass(frozen=True)
class BranchStatus:
    """Where a branch stands and how it does.

    `step` updates finished over the whole run; `cycle` counts from 0; `phase_step` of `phase_steps` updates are
    finished in this phase (the last status of a phase has phase_step = phase_steps). `reward` mean of the latest step's
    own rollouts; `overlap` and `symkl` by teacher, latest probe. `event`: the branch's latest event ("checkpoint at
    step 50"); it may be repeated in later statuses and is shown once.
    """

    state: State
    step: int = 0
    cycle: int = 0
    phase: Literal["explore", "exchange"] = "explore"
    phase_step: int = 0
    phase_steps: int = 0
    reward: float | None = None
    overlap: Mapping[str, float] = field(default_factory=dict)
    symkl: Mapping[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    event: str | None = None

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite become null or, in `overlap` and `symkl`, are left out."""
        values = asdict(self)
        for key in ("reward", "tokens_per_second"):
            values[key] = values[key] if _is_finite(values[key]) else None
        for key in ("overlap", "symkl"):
            values[key] = {teacher: value for teacher, value in values[key].items() if _is_finite(value)}
        return json.dumps(values, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> BranchStatus:
        """The status that `to_json` wrote. Raises CopdError for anything else."""
        try:
            values = json.loads(text)
            unknown = set(values) - {field.name for field in fields(cls)}
            if (
                unknown
                or values["state"] not in STATES
                or values.get("phase", "explore") not in ("explore", "exchange")
            ):
                raise ValueError(f"unexpected keys {sorted(unknown)} or an unknown state or phase")
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CopdError(
                f"expected a branch's status as JSON, found {text[:80]!r} ({error}); "
                "do all processes run the same version of copd-megatron?"
            ) from error


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
