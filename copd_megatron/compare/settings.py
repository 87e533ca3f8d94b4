"""The description of a comparison: arms that differ from one common configuration, and the rows that they give."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from copd_megatron.config.load import check, read_yaml
from copd_megatron.config.run import RunConfig
from copd_megatron.config.section import Section
from copd_megatron.errors import ConfigError


def _as_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class Row(Section):
    """A row of the table: one model of an arm's run."""

    label: str
    """What the table calls it."""
    model: str
    """What the run's evaluation calls it: base, merged, or `<branch> branch`."""
    equal_budget: bool = True
    """Whether it must have cost as many updates and rollout tokens as the (first) reference; an expert by itself has
    not."""
    ratio: float | None = Field(None, gt=0)
    """S_RL : S_OPD, of rows that belong to the plot of the rhythm sweep."""


class Arm(Section):
    """One run per seed."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of the arm and of its runs' folders."""
    rows: tuple[Row, ...] = Field(min_length=1)
    """What it gives to the table."""
    settings: dict[str, Any] = Field({})
    """What differs from `common`, in the form of a run description."""
    experts: str | None = None
    """Arm whose branches are this one's `experts`, of the same seed; it must stand before."""


class Comparison(Section):
    """A comparison. Its runs are <out>/runs/<arm>_seed<seed>, its results <out>/compare.{json,md,html}."""

    out: str
    """Folder of everything."""
    reference: Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_as_several)]
    """Label of the row that all others are compared with, or labels of several; budgets are compared with the first."""
    arms: tuple[Arm, ...] = Field(min_length=1)
    """Arms, in the order in which they are run."""
    common: dict[str, Any] = Field({})
    """A run description without `seed` and `run_dir`; `{seed}` in a text stands for the seed."""
    from_run: str | None = None
    """File of a run description that `common` changes as an arm changes `common`."""
    with_branches: tuple[str, ...] | None = Field(None, min_length=1)
    """Those of its branches that take part; all where it is absent."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds; each is a repetition of everything, base included."""
    tolerance: float = Field(0.02, ge=0)
    """Largest share by which updates and rollout tokens may differ between rows of equal budget."""
    replicates: int = Field(2000, ge=100)
    """Bootstrap replicates."""

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        names = [arm.name for arm in self.arms]
        labels = [row.label for arm in self.arms for row in arm.rows]
        several = {"arms: names": names, "rows: labels": labels, "seeds": self.seeds, "reference": self.reference}
        for what, given in several.items():
            if len(set(given)) != len(given):
                raise ValueError(f"{what} must differ, found {list(given)}")
        for reference in self.reference:
            if reference not in labels:
                raise ValueError(f"reference = {reference!r} is none of the rows {', '.join(labels)}")
        for number, arm in enumerate(self.arms):
            if arm.experts is not None and arm.experts not in names[:number]:
                raise ValueError(f"arms.{arm.name}.experts = {arm.experts!r} is no arm before it")
        return self

    def run_dir(self, arm: str, seed: int) -> Path:
        """Where an arm's run of a seed is."""
        return Path(self.out) / "runs" / f"{arm}_seed{seed}"

    def run(self, arm: Arm, seed: int) -> RunConfig:
        """The run of an arm. Raises ConfigError if it is no valid description."""
        content = merged(self._common, arm.settings)
        content |= {"seed": seed, "run_dir": str(self.run_dir(arm.name, seed))}
        if arm.experts is not None:
            run = self.run_dir(arm.experts, seed)
            names = [branch["name"] for branch in content.get("branches", ())]
            content["experts"] = {name: str(run / "branches" / name / "final") for name in names}
        return check(filled(content, seed), RunConfig, f"arm {arm.name}, seed {seed}")

    @cached_property
    def _common(self) -> dict[str, Any]:
        """`common` with what it comes from."""
        content = merged(read_yaml(self.from_run) if self.from_run is not None else {}, self.common)
        if self.with_branches is None:
            return content
        branches = {branch["name"]: branch for branch in content.get("branches", ())}
        if unknown := [name for name in self.with_branches if name not in branches]:
            raise ConfigError(f"with_branches: {', '.join(unknown)} is none of {', '.join(branches)}")
        return {**content, "branches": [branches[name] for name in self.with_branches]}


def merged(common: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`common` with `changes`, mapping by mapping; anything else is replaced as a whole."""
    result = dict(common)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else value
    return result


def filled(value: Any, seed: int) -> Any:
    """With the seed in place of `{seed}` in every text."""
    if isinstance(value, dict):
        return {key: filled(inner, seed) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [filled(inner, seed) for inner in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value
