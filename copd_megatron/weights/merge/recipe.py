"""How models are merged: the method and its parameters. Needs no torch, so that a run description can be checked."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from copd_megatron.errors import ConfigError

MethodName = Literal["linear", "slerp", "task", "ties", "dare_linear", "dare_ties", "multislerp", "karcher"]
METHODS: tuple[MethodName, ...] = get_args(MethodName)

_SPARSE = ("ties", "dare_linear", "dare_ties")
_SCALED = ("task", *_SPARSE)
_NORMALISED = {"linear": True, "task": False, "ties": True, "dare_linear": False, "dare_ties": False}
_DENSITY = 0.5


@dataclass(frozen=True)
class Recipe:
    """A merge method and its parameters; None stands for the method's default.

    weights         one per input, 1/n each by default
    tensor_weights  (pattern, weights) for the tensors whose names match (fnmatch); of several, the last that matches
    normalise       divide by the sum of the weights; default: linear and ties do, task and dare do not; slerp,
                    multislerp and karcher always do
    density         share of each input's changes that is kept (ties, dare), 0.5 by default
    scale           λ, the factor of the merged changes (task, ties, dare), 1 by default
    seed            of dare's random choices

    Raises ConfigError for a method that does not exist, a parameter outside its range or one the method has no use for.
    """

    method: str = "linear"
    weights: tuple[float, ...] | None = None
    tensor_weights: tuple[tuple[str, tuple[float, ...]], ...] = ()
    normalise: bool | None = None
    density: float | None = None
    scale: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"merge method {self.method!r} does not exist; there is: {', '.join(METHODS)}")
        for name, users in (("normalise", tuple(_NORMALISED)), ("density", _SPARSE), ("scale", _SCALED)):
            if getattr(self, name) is not None and self.method not in users:
                raise ConfigError(f"merge method {self.method} has no use for {name}; leave it out")
        if self.density is not None and not 0 < self.density <= 1:
            raise ConfigError(f"merge density is {self.density:g}; expected more than 0 and at most 1")
        if self.scale is not None and not math.isfinite(self.scale):
            raise ConfigError(f"merge scale is {self.scale}; expected a finite number")
        for where, weights in self._all_weights():
            self._check(where, weights)

    @property
    def kept(self) -> float:
        """The density in force."""
        return _DENSITY if self.density is None else self.density

    @property
    def factor(self) -> float:
        """The scale in force."""
        return 1.0 if self.scale is None else self.scale

    @property
    def divides(self) -> bool:
        """Whether weights are divided by their sum."""
        return _NORMALISED.get(self.method, True) if self.normalise is None else self.normalise

    @property
    def chance(self) -> bool:
        """Whether the result depends on the seed."""
        return self.method.startswith("dare")

    def check_inputs(self, count: int) -> None:
        """Raise ConfigError unless the recipe is one for `count` inputs."""
        if count == 0:
            raise ConfigError("nothing to merge: give at least one model")
        if self.method == "slerp" and count != 2:
            raise ConfigError(f"slerp merges two models, {count} are given; multislerp and karcher take any number")
        if self.method in ("multislerp", "karcher") and count < 2:
            raise ConfigError(f"{self.method} merges two or more models, one is given")
        for where, weights in self._all_weights():
            if len(weights) != count:
                raise ConfigError(f"{where}: {len(weights)} given for {count} models; give one for each")

    def check_patterns(self, names: Collection[str]) -> None:
        """Raise ConfigError if a pattern of `tensor_weights` matches none of the tensors."""
        for pattern, _ in self.tensor_weights:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"tensor weights: no tensor's name matches {pattern!r}")

    def weights_of(self, name: str, count: int) -> tuple[float, ...]:
        """The weights of the inputs for the tensor `name`, as given."""
        weights = (1 / count,) * count if self.weights is None else self.weights
        for pattern, special in self.tensor_weights:
            if fnmatchcase(name, pattern):
                weights = special
        return weights

    def _all_weights(self) -> list[tuple[str, Sequence[float]]]:
        common: list[tuple[str, Sequence[float]]] = [] if self.weights is None else [("merge weights", self.weights)]
        return common + [(f"merge weights of {pattern}", weights) for pattern, weights in self.tensor_weights]

    def _check(self, where: str, weights: Sequence[float]) -> None:
        if not all(math.isfinite(weight) for weight in weights):
            raise ConfigError(f"{where} must be finite; found {list(weights)}")
        # ties divides by the sum of the weights that agree, element by element.
        if self.divides and self.method != "ties" and abs(sum(weights)) < 1e-8:
            raise ConfigError(f"{where} {list(weights)} sum to 0, by which they cannot be divided")
        if self.method in ("multislerp", "karcher") and min(weights, default=0.0) < 0:
            raise ConfigError(f"{where} {list(weights)}: {self.method} takes no negative weights")
