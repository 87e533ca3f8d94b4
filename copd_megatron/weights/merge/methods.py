"""The merge methods: from a stream of slices of one tensor to the slices of the merged one, in float32.

Let x_i be the inputs, b the base, δ_i = x_i − b the changes, w_i the weights (divided by their sum where the recipe
says so), λ the scale.

| method        | result                                                                                             |
|---------------|----------------------------------------------------------------------------------------------------|
| `linear`      | Σ w_i x_i (the paper: w_i = 1/n; also Wortsman et al. 2022)                                         |
| `task`        | b + λ Σ w_i δ_i (task arithmetic, Ilharco et al. 2023)                                              |
| `ties`        | only the largest |δ_i|; per element the sign that has more weight; the weighted mean of the changes |
|               | of that sign (Yadav et al. 2023)                                                                   |
| `dare_linear` | each δ_i's elements kept by chance (`density`) and divided by it, then as `task` (Yu et al. 2024)   |
| `dare_ties`   | the same, then sign and sum as in `ties`                                                           |
| `slerp`       | along the arc from x_1 to x_2 about the origin                                                     |
| `multislerp`  | b + the mean direction of the δ_i, as long as they are on average                                  |
| `karcher`     | the Riemannian mean of the x_i's directions, as long as they are on average                        |

Differences from mergekit 0.1.5, of the same names: dare divides by the density, which leaves the expected change as it
is (Yu et al., eq. 3), where mergekit scales each tensor to keep its sum of magnitudes; `ties` keeps the first of equal
magnitudes, where mergekit leaves it to a sort that is not stable; `karcher` takes weights and is iterated to the end,
where mergekit stops after ten steps; and changes that cancel out are averaged, where mergekit's multislerp gives up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copd_megatron.weights.merge import sphere, trim
from copd_megatron.weights.merge.stream import Stream


@dataclass(frozen=True)
class Terms:
    """A recipe as it applies to one tensor: a weight for each of the stream's inputs, divided by their sum where
    `normalise` says so (`ties` divides per element), and a random generator for each where there is chance."""

    weights: Sequence[float]
    normalise: bool = True
    density: float = 1.0
    scale: float = 1.0
    generators: Sequence[torch.Generator] = ()

    @property
    def shares(self) -> list[float]:
        """Weights, of sum 1 if `normalise`."""
        total = sum(self.weights) if self.normalise else 1.0
        return [weight / total for weight in self.weights]


Method = Callable[[Stream, Terms], Iterator[Tensor]]


def linear(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """Σ w_i x_i."""
    return _sum_of_inputs(stream, terms.shares)


def task(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """b + λ Σ w_i δ_i."""
    return _sum_of_deltas(stream, terms.shares, terms.scale)


def slerp(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """Along the arc between two inputs."""
    return _sum_of_inputs(stream, sphere.slerp(sphere.gram(stream, from_base=False), terms.shares))


def karcher(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """The Riemannian mean of the inputs' directions."""
    return _sum_of_inputs(stream, sphere.karcher(sphere.gram(stream, from_base=False), terms.shares))


def multislerp(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """The mean direction of the changes."""
    return _sum_of_deltas(stream, sphere.multislerp(sphere.gram(stream, from_base=True), terms.shares))


def dare_linear(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """b + λ Σ w_i δ_i of the elements kept by chance."""
    for chunk in stream:
        base = chunk.base()
        total = stream.buffer("total", chunk.size).zero_()
        for index, (share, chance) in enumerate(zip(terms.shares, terms.generators, strict=True)):
            delta = _drop(chunk.delta(index, base), chance, terms.density, stream)
            total.add_(delta, alpha=share)
        yield torch.add(base, total, alpha=terms.scale, out=total)


def ties(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """The largest changes, of the sign that prevails."""
    cuts = trim.cuts(stream, terms.density) if terms.density < 1 else []
    for chunk in stream:
        base = chunk.base()
        deltas = [chunk.delta(index, base, f"input {index}") for index in range(len(terms.weights))]
        for cut, delta in zip(cuts, deltas, strict=False):
            cut.apply(delta)
        merged = _agreed(stream, deltas, terms)
        yield torch.add(base, merged, alpha=terms.scale, out=merged)


def dare_ties(stream: Stream, terms: Terms) -> Iterator[Tensor]:
    """Changes kept by chance, of the sign that prevails."""
    for chunk in stream:
        base = chunk.base()
        deltas = [
            _drop(chunk.delta(index, base, f"input {index}"), chance, terms.density, stream)
            for index, chance in enumerate(terms.generators)
        ]
        merged = _agreed(stream, deltas, terms)
        yield torch.add(base, merged, alpha=terms.scale, out=merged)


METHODS: dict[str, Method] = {
    "linear": linear,
    "slerp": slerp,
    "task": task,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
    "multislerp": multislerp,
    "karcher": karcher,
}


def _sum_of_inputs(stream: Stream, coefficients: Sequence[float]) -> Iterator[Tensor]:
    for chunk in stream:
        total = chunk.input(0, "total").mul_(coefficients[0])
        for index, coefficient in enumerate(coefficients[1:], 1):
            total.add_(chunk.input(index), alpha=coefficient)
        yield total


def _sum_of_deltas(stream: Stream, coefficients: Sequence[float], scale: float = 1.0) -> Iterator[Tensor]:
    for chunk in stream:
        base = chunk.base()
        total = chunk.delta(0, base, "total").mul_(coefficients[0])
        for index, coefficient in enumerate(coefficients[1:], 1):
            total.add_(chunk.delta(index, base), alpha=coefficient)
        yield torch.add(base, total, alpha=scale, out=total)


def _drop(delta: Tensor, chance: torch.Generator, density: float, stream: Stream) -> Tensor:
    """`delta` [n] in place: each element kept with probability `density` and divided by it, else 0.

    Products, not choices: what is not finite stays so wherever it is dropped, and is found.
    """
    if density == 1:
        return delta
    drawn = torch.rand(delta.shape, generator=chance, out=stream.buffer("drawn", delta.numel()))
    kept = torch.lt(drawn, density, out=drawn)
    return delta.mul_(kept).div_(density)


def _agreed(stream: Stream, deltas: Sequence[Tensor], terms: Terms) -> Tensor:
    """Per element the sum, or with `normalise` the weighted mean, of the weighted changes [n] whose sign prevails.

    The sign prevails that the sum of all weighted changes has; + where that is 0. `deltas` are overwritten.
    """
    size = len(deltas[0])
    total, sign, divisor = (stream.buffer(use, size) for use in ("total", "sign", "divisor"))
    total.zero_()
    for delta, weight in zip(deltas, terms.weights, strict=True):
        total.add_(delta.mul_(weight))
    torch.copysign(torch.ones(()), total.add_(0.0), out=sign)  # −0 + 0 is +0
    total.zero_()
    divisor.zero_()
    for delta, weight in zip(deltas, terms.weights, strict=True):
        agreeing = delta.mul_(sign).relu_()
        total.add_(agreeing)
        if terms.normalise:
            divisor.add_(agreeing.sign_(), alpha=weight)
    if terms.normalise:
        if min(terms.weights) >= 0:
            # Where nobody agrees 0 is divided by half the smallest weight: cheaper than to look for zeros.
            divisor.clamp_(min=min((weight for weight in terms.weights if weight > 0), default=1.0) / 2)
        else:
            divisor.masked_fill_(divisor == 0, 1.0)
        total.div_(divisor)
    return total.mul_(sign)
