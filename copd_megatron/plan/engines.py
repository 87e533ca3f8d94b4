"""Engines: what they hold, how many sequences they decode at once, and how long decoding and prefill take."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from copd_megatron.config.run import RunConfig
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.geometry import Geometry
from copd_megatron.plan.hardware import Gpu
from copd_megatron.plan.shards import Shards

Placement = Literal["colocated", "disaggregated"]
"""On the GPUs of the branch's policy, asleep while it trains, or on GPUs of their own."""


@dataclass(frozen=True)
class Fleet:
    """The engines of one branch: `servers` of `gpus` GPUs each, which hold weights in `number` bytes each."""

    placement: Placement
    servers: int
    gpus: int
    in_flight: int
    number: int
    embedded: bool = False

    @property
    def total_gpus(self) -> int:
        """GPUs of all servers."""
        return self.servers * self.gpus


def fleet_of(config: RunConfig, replicas: int, placement: Placement | None, engine_gpus: int | None) -> Fleet:
    """The engines that the configuration asks for. `placement`: by default colocated if servers sleep; `engine_gpus`
    for each branch, in place of rollout.sglang.servers × tensor_parallel."""
    settings = config.rollout.sglang
    number = 4 if config.precision.params == "fp32" else 2
    if config.rollout.engine == "embedded":
        return Fleet("colocated", replicas, 1, config.rollout.max_rows, number, embedded=True)
    servers = settings.servers if engine_gpus is None else max(1, engine_gpus // settings.tensor_parallel)
    place = placement or ("colocated" if settings.sleep else "disaggregated")
    return Fleet(place, servers, settings.tensor_parallel, settings.in_flight, number)


def weight_bytes(shards: Shards, fleet: Fleet) -> float:
    """A server's weights on one of its GPUs."""
    return shards.total * fleet.number / fleet.gpus


def cache_bytes_per_token(geometry: Geometry, fleet: Fleet) -> float:
    """Keys and values of a token on one of a server's GPUs; groups are repeated where there are fewer than GPUs."""
    divided = min(fleet.gpus, geometry.groups)
    return 2.0 * geometry.layers * geometry.key / divided * fleet.number


@dataclass(frozen=True)
class Speed:
    """How fast one server is whose GPUs have `cache` bytes each for keys and values."""

    geometry: Geometry
    shards: Shards
    fleet: Fleet
    gpu: Gpu
    assumed: Assumptions
    cache: float

    def slots(self, context: float) -> int:
        """Sequences of `context` tokens of their own that are decoded at once; at least one."""
        return max(1, engine_slots(self.shards, self.fleet, self.cache, context))

    def step_seconds(self, sequences: float, context: float) -> float:
        """One token for each of `sequences` sequences, which have `context` tokens so far: reading weights and cache,
        or computing if that takes longer."""
        gpus, number = self.fleet.gpus, self.fleet.number
        bandwidth = gpus * self.gpu.bandwidth * self.assumed.decode_bandwidth
        cache = sequences * context * cache_bytes_per_token(self.geometry, self.fleet) * gpus
        reading = (self._weights_met(sequences) * number + cache) / bandwidth
        computing = 2.0 * self.shards.active * sequences / (gpus * self.gpu.bf16 * self.assumed.prefill_efficiency)
        return max(reading, computing) + self.assumed.decode_seconds

    def _weights_met(self, sequences: float) -> float:
        """Weights that a step reads: of the experts those that somebody has chosen."""
        experts = self.geometry.experts
        if not experts:
            return float(self.shards.total)
        shared, chosen = self._split()
        return shared + (self.shards.total - shared) * (1 - (1 - chosen / experts) ** sequences)

    def _split(self) -> tuple[float, int]:
        """Weights outside experts, and experts a token chooses: total = s + e, active = s + e · chosen / experts."""
        share = self.geometry.chosen / self.geometry.experts
        return (self.shards.active - share * self.shards.total) / (1 - share), self.geometry.chosen

    def prefill_seconds(self, operations: float) -> float:
        """These operations on given tokens."""
        return operations / (self.fleet.gpus * self.gpu.bf16 * self.assumed.prefill_efficiency)

    def decode_seconds(self, lengths: Sequence[float], prompt: int, group: int) -> float:
        """Until the last of these responses is there, in the order given. `group` of them share a prompt of `prompt`
        tokens, whose keys and values are there once; room is made for whole responses, and on average half of one has
        been read."""
        average = sum(lengths) / len(lengths)
        return decode(
            lengths, self.slots(prompt / group + average), lambda count: self.step_seconds(count, prompt + average / 2)
        )


def engine_slots(shards: Shards, fleet: Fleet, cache: float, context: float) -> int:
    """Sequences of `context` tokens that a server's cache holds at once; 0 if not even one."""
    if fleet.embedded:
        return fleet.in_flight
    return min(fleet.in_flight, int(cache / (cache_bytes_per_token(shards.geometry, fleet) * context)))


def decode(lengths: Sequence[float], slots: int, step_seconds: Callable[[int], float]) -> float:
    """Time to decode responses of these lengths with `slots` at a time; `step_seconds(n)` is what a token for each of n
    takes. A waiting one takes the place of the first that ends."""
    waiting = list(reversed(lengths))
    running: list[float] = []
    clock = done = 0.0  # `done`: tokens that somebody has decoded who was there from the start
    while waiting or running:
        while waiting and len(running) < slots:
            heapq.heappush(running, done + waiting.pop())
        end = heapq.heappop(running)
        clock += (end - done) * step_seconds(len(running) + 1)
        done = end
    return clock
