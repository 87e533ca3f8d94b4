"""When a phase ends: after a fixed number of updates, or by the overlap that is measured."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from copd_megatron.config.section import Section
from copd_megatron.rhythm import FixedRhythm
from copd_megatron.steering.absorption import NARROWEST, Search
from copd_megatron.steering.overlap import Limits
from copd_megatron.steering.steered import Lengths, SteeredRhythm


class RhythmConfig(Section):
    """How the two phases alternate. A mere name stands for its `kind`: `rhythm: overlap`."""

    kind: Literal["fixed", "overlap", "absorption"] = "fixed"
    """`fixed`: the same number of updates in every cycle. `overlap`: Phase I until the overlap of an edge is below
    `low`, Phase II until every edge is above `high` or has stopped rising. `absorption`: the same, and after each
    Phase II `low` and `high` move to where most was absorbed per update. All make the same number of updates."""
    cycles: int = Field(4, ge=1)
    """Cycles of one Phase I and one Phase II (the paper's N; not given there). A steered rhythm has as many updates,
    and as many cycles as come of it."""
    explore_steps: int = Field(15, ge=0)
    """Updates of Phase I in a cycle (the paper's S_RL)."""
    exchange_steps: int = Field(10, ge=0)
    """Updates of Phase II in a cycle (the paper's S_OPD; best ratio to S_RL there 1 : 1.5)."""
    explore_bounds: tuple[int, int] | None = None
    """Shortest and longest steered Phase I; default: a third and twice `explore_steps`."""
    exchange_bounds: tuple[int, int] | None = None
    """Shortest and longest steered Phase II; default: a third and twice `exchange_steps`. The last one, with which
    every run ends, has at least `exchange_steps` and may be longer."""
    low: float = Field(0.90, ge=0, le=1)
    """Phase I ends when the overlap (overlap@k, k = log.overlap_k) of an edge is below, or would be (`ahead`)."""
    high: float = Field(0.95, ge=0, le=1)
    """Phase II ends when that of every edge is above."""
    low_support: float | None = Field(0.5, ge=0, le=1)
    """Phase I also ends when a student has lost more than this share of a teacher's rollouts (`support/<teacher>`), and
    no edge counts as recovered in Phase II before it has them back. None: overlap alone."""
    sureness: float = Field(1.0, ge=0)
    """Standard errors by which a moving average must be beyond a bound, or above what came before it."""
    smoothing: float = Field(0.7, gt=0, le=1)
    """Weight of the newest probe in the moving average, which starts anew with each phase."""
    patience: int = Field(2, ge=1)
    """Probes (one every log.probe_every updates) in which overlap did not rise, after which it has stopped rising."""
    ahead: float = Field(0.0, ge=0)
    """Probes by which Phase I looks ahead: it also ends when overlap would be below `low` by then if it went on falling
    as since the last probe. With 1, `low` is a bound that overlap keeps rather than one that it crosses."""
    rate: float = Field(0.5, gt=0, le=1)
    """`absorption`: share of the way that bounds move towards the best Phase II."""
    memory: int = Field(4, ge=1)
    """`absorption`: latest Phases II that are compared."""
    range: tuple[float, float] = (0.5, 1.0)
    """`absorption`: within which `low` and `high` stay."""

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"kind": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _consistent(self) -> RhythmConfig:
        if self.explore_steps + self.exchange_steps == 0:
            raise ValueError("explore_steps and exchange_steps are both 0: nothing would be trained")
        if self.kind != "fixed":
            self._check_steering()
        return self

    def _check_steering(self) -> None:
        if not (self.explore_steps and self.exchange_steps):
            raise ValueError(f"kind = {self.kind} needs both phases: explore_steps and exchange_steps of at least 1")
        for name, nominal, bounds in (
            ("explore", self.explore_steps, self.lengths.explore),
            ("exchange", self.exchange_steps, self.lengths.exchange),
        ):
            if not 1 <= bounds[0] <= nominal <= bounds[1]:
                raise ValueError(
                    f"{name}_bounds = {list(bounds)}: expected [shortest, longest] around {name}_steps = {nominal}"
                )
        if not self.low < self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        least, most = self.range
        if not 0 <= least <= most - NARROWEST <= 1 - NARROWEST:
            raise ValueError(f"range = {list(self.range)}: expected [least, most] in [0, 1], {NARROWEST} apart")

    @property
    def lengths(self) -> Lengths:
        """The bounds in force of a steered rhythm."""
        return Lengths(
            total=self.cycles * (self.explore_steps + self.exchange_steps),
            explore=self.explore_bounds or _around(self.explore_steps),
            exchange=self.exchange_bounds or _around(self.exchange_steps),
            last=self.exchange_steps,
        )

    def open(self) -> FixedRhythm | SteeredRhythm:
        """The rhythm at its beginning."""
        if self.kind == "fixed":
            return FixedRhythm(self.cycles, self.explore_steps, self.exchange_steps)
        limits = Limits(self.low, self.high, self.low_support, self.sureness, self.smoothing, self.patience, self.ahead)
        search = Search(self.rate, self.memory, *self.range) if self.kind == "absorption" else None
        return SteeredRhythm(self.lengths, limits, search)


def _around(nominal: int) -> tuple[int, int]:
    return max(1, nominal // 3), 2 * nominal
