"""The parameters of every kind of rank, counted in the real model: `python -m copd_megatron.plan.shards < requests`.

torch's "fake" process group plays all other ranks, and on the device "meta" tensors have shapes but no memory, so that
`build_shard` builds a shard of a model of any size in seconds. Ranks differ by pipeline stage alone: tensor, expert and
data parallel ones hold as much as each other. Both are states of a whole process, hence a child process of its own.
"""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from copd_megatron.errors import ConfigError, CopdError
from copd_megatron.plan.geometry import Geometry
from copd_megatron.policy.degrees import Layout

PARTS = ("vision", "embedding", "decoder", "output_layer")


@dataclass(frozen=True)
class ShardRequest:
    """A model (folder with a config.json) on a layout. `params`: fp32 or bf16."""

    base: str
    layout: Layout
    params: str


@dataclass(frozen=True)
class Stage:
    """Parameters that a rank of one pipeline stage holds, experts apart, and its decoder layers."""

    layers: int
    dense: int
    expert: int

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.dense + self.expert


@dataclass(frozen=True)
class Shards:
    """A model's sizes and its ranks, stage by stage; `total` parameters in all, of which a token meets `active`."""

    geometry: Geometry
    stages: tuple[Stage, ...]
    total: int
    active: int

    @staticmethod
    def of(answer: dict[str, Any]) -> Shards:
        """From what `count_one` gave."""
        stages = tuple(Stage(**stage) for stage in answer["stages"])
        return Shards(Geometry.of(answer["geometry"]), stages, answer["total"], answer["active"])


def count(requests: Sequence[ShardRequest]) -> list[Shards]:
    """Of every request, in a child process. ConfigError if a layout does not fit its model."""
    asked = [{**asdict(request), "layout": asdict(request.layout)} for request in requests]
    # A GPU is of no use here, and would make megatron-core ask for CUDA's libraries.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-m", __name__], input=json.dumps(asked), capture_output=True, text=True, env=environment
    )
    if child.returncode:
        raise CopdError(f"the model could not be built for planning:\n{child.stderr.strip()[-2000:]}")
    found = []
    for answer in json.loads(child.stdout.splitlines()[-1]):
        if "error" in answer:
            raise ConfigError(answer["error"])
        found.append(Shards.of(answer))
    return found


def smallest(layout: Layout) -> Layout:
    """The layout with the fewest processes that divides a model alike: replicas beyond that add none."""
    world = math.lcm(layout.replica, layout.ep * layout.expert_tp * layout.pp)
    return replace(layout, world=world)


def count_one(request: dict[str, Any]) -> dict[str, Any]:
    """Of one request as plain data, in this process; {"error": …} if the layout does not fit."""
    layout = smallest(Layout(**request["layout"]))
    try:
        return _counted(Path(request["base"]), layout, request["params"])
    except CopdError as error:
        return {"error": str(error)}


def _counted(base: Path, layout: Layout, precision: Any) -> dict[str, Any]:
    import torch

    from copd_megatron.policy.qwen3_vl import build_shard

    stages: list[dict[str, int]] = []
    total, active = 0.0, 0.0
    geometry: dict[str, Any] = {}
    for number in range(layout.pp):
        with playing(number * layout.world // layout.pp, layout), torch.device("meta"), _without_values():
            chunks = build_shard(base, layout, precision)
            settings = chunks[0].settings
            geometry = Geometry.described(settings)
            tally: Counter[str] = Counter()
            for name, parameter in _distinct(chunks):
                expert = ".experts." in name
                tally["expert" if expert else "dense"] += parameter.numel()
                if settings.text.tied and layout.pp > 1 and name.startswith("output_layer."):
                    continue  # the first stage's embedding once more
                whole = _copies(parameter, expert, layout) * parameter.numel()
                total += whole
                share = settings.text_config.moe_router_topk / settings.text_config.num_moe_experts if expert else 1
                active += whole * share
            layers = sum(len(chunk.decoder.layers) for chunk in chunks)
            stages.append({"layers": layers, "dense": tally["dense"], "expert": tally["expert"]})
    return {"geometry": geometry, "stages": stages, "total": round(total), "active": round(active)}


def _without_values() -> Any:
    """Initial values of tensors that hold none would take most of the time."""
    import torch
    from torch.overrides import TorchFunctionMode

    class WithoutValues(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if function is torch.Tensor.normal_ else function(*args, **(kwargs or {}))

    return WithoutValues()


def _distinct(chunks: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    return (pair for chunk in chunks for pair in chunk.named_parameters())


def _copies(parameter: Any, expert: bool, layout: Layout) -> int:
    """Ranks of a stage that hold different parts of a parameter like this one."""
    divided = getattr(parameter, "tensor_model_parallel", False)
    if expert:
        return layout.ep * (layout.expert_tp if divided else 1)
    return layout.tp if divided else 1


@contextmanager
def playing(rank: int, layout: Layout) -> Iterator[None]:
    """While it lasts, this process is rank `rank` of a gang of `layout.world` that is otherwise not there."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from copd_megatron.policy import layout as layouts
    from copd_megatron.policy import platform

    platform.prepare()
    from megatron.core import parallel_state

    original, world = parallel_state.initialize_model_parallel, os.environ.get("WORLD_SIZE")
    # The fake group has no gloo beside it.
    parallel_state.initialize_model_parallel = functools.partial(original, create_gloo_process_groups=False)
    os.environ["WORLD_SIZE"] = str(layout.world)
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
        layouts.initialize(layout)
        yield
        layouts.shutdown()
    finally:
        parallel_state.initialize_model_parallel = original
        os.environ.pop("WORLD_SIZE")
        if world is not None:
            os.environ["WORLD_SIZE"] = world


if __name__ == "__main__":
    print(json.dumps([count_one(request) for request in json.load(sys.stdin)]))
