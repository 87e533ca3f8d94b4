"""Which example comes next: a seeded permutation per epoch, shared out over the data-parallel ranks, resumable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from copd_megatron.errors import DataError
from copd_megatron.randomness import seed_for


class Sampler:
    """An endless stream of indices below `size`, in which every epoch visits each index once.

    The stream is one sequence for all ranks, and rank r of `world` takes its places r, r + world, r + 2 world, ….
    So ranks never draw the same place, together they draw each, and a saved position means the same whatever the
    number of ranks. Batches run across the end of an epoch, however small the data set. The order depends on `seed`,
    `name` and the epoch alone, and on no global random state.
    """

    def __init__(self, size: int, seed: int, name: str, rank: int = 0, world: int = 1) -> None:
        if size < 1:
            raise DataError(f"sampler {name!r}: the data set has {size} examples, expected at least one")
        if not 0 <= rank < world:
            raise ValueError(f"sampler {name!r}: rank {rank} is not below world {world}")
        self._size = size
        self._seed = seed
        self._name = name
        self._rank = rank
        self._world = world
        self._position = 0
        self._orders: dict[int, np.ndarray] = {}

    @property
    def epoch(self) -> int:
        """How many times the whole data set has been drawn by all ranks together."""
        return self._position // self._size

    def draw(self, count: int) -> list[int]:
        """This rank's next `count` indices."""
        if count < 0:
            raise ValueError(f"sampler {self._name!r}: cannot draw {count} examples")
        first = self._position + self._rank
        self._position += count * self._world
        return [self._index(place) for place in range(first, first + count * self._world, self._world)]

    def state_dict(self) -> dict[str, Any]:
        """What identifies the stream, and `position`: the number of places that all ranks together have passed, if
        each drew as many as this one. Ranks that drew different numbers save `furthest` of their states."""
        return {"size": self._size, "seed": self._seed, "name": self._name, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, with any number of ranks. Raises DataError if it is another stream's."""
        own = self.state_dict()
        if set(state) != set(own):
            raise DataError(f"sampler {self._name!r}: the saved state has {sorted(state)}, expected {sorted(own)}")
        for key in ("size", "seed", "name"):
            if state[key] != own[key]:
                raise DataError(
                    f"sampler {self._name!r}: the saved state has {key} {state[key]!r}, this run has {own[key]!r}; "
                    "resume with the data and seed of the saved run, or start a new one"
                )
        position = state["position"]
        if type(position) is not int or position < 0:
            raise DataError(f"sampler {self._name!r}: the saved position is {position!r}, expected a count")
        self._position = position

    def _index(self, place: int) -> int:
        epoch, offset = divmod(place, self._size)
        if epoch not in self._orders:
            # Batches move forward and span few epochs; earlier orders are not needed again.
            self._orders = {near: order for near, order in self._orders.items() if near == epoch - 1}
            self._orders[epoch] = self._order(epoch)
        return int(self._orders[epoch][offset])

    def _order(self, epoch: int) -> np.ndarray:
        # NumPy keeps a bit generator's raw stream the same from version to version, but not `Generator.permutation`.
        # A resumed run must not depend on the version, so the order is that of raw 64-bit keys.
        bits = np.random.PCG64(seed_for(self._seed, "sampler", self._name, epoch))
        return np.argsort(bits.random_raw(self._size), kind="stable")


def furthest(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state of the rank that has drawn most: resuming all ranks from it repeats nothing."""
    return max(states, key=lambda state: state["position"])
