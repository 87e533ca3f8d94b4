"""How one branch's processes divide the model: the degrees of parallelism. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of one branch.

    `world` processes; `tp` tensor, `pp` pipeline, `vpp` virtual pipeline stages per process, `cp` context, `ep` expert,
    `etp` expert tensor parallel (0: as `tp`). What is left over is data parallelism (`dp`). Experts are divided among
    replicas: ep lies within dp × cp.
    """

    world: int = 1
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 0
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        degrees = {name: getattr(self, name) for name in ("world", "tp", "pp", "vpp", "cp", "ep")}
        for name, degree in degrees.items():
            if degree < 1:
                raise ConfigError(f"parallel.{name} is {degree}; a degree of parallelism is at least 1")
        if self.sequence_parallel and self.tp == 1:
            raise ConfigError(
                "parallel.sequence_parallel divides what tensor parallelism leaves whole; it needs tp of at least 2"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(f"parallel.vpp = {self.vpp} needs pipeline stages to cut up; it needs pp of at least 2")
        for what, size in (
            ("replicas of tp × pp × cp", self.replica),
            ("groups of experts of ep × etp × pp", self.ep * self.expert_tp * self.pp),
        ):
            if self.world % size:
                raise ConfigError(
                    f"parallel: world = {self.world} processes cannot be divided into {what} = {size} processes; "
                    "make world a multiple of that"
                )

    @property
    def replica(self) -> int:
        """Processes that hold one copy of the model together."""
        return self.tp * self.pp * self.cp

    @property
    def expert_tp(self) -> int:
        """Processes that share one expert's matrices."""
        return self.etp or self.tp

    @property
    def dp(self) -> int:
        """Copies of the model."""
        return self.world // self.replica
