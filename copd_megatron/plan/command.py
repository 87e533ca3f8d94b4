"""`copd plan`: the plan of one configuration, or how it scales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

from rich.console import Console

from copd_megatron.cluster.placement import check, node_groups
from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import ConfigError, CopdError
from copd_megatron.files import write_atomic
from copd_megatron.plan.assumptions import assumptions_of
from copd_megatron.plan.engines import Placement
from copd_megatron.plan.hardware import gpu_of
from copd_megatron.plan.plan import make_plans, model_folder
from copd_megatron.plan.report import as_data, print_plan
from copd_megatron.plan.verdict import verdict


class DoesNotFit(CopdError):
    """The run cannot start as it is described; the reasons have been printed."""


def plan(
    file: Path,
    overrides: Sequence[str],
    console: Console,
    *,
    gpu: str,
    nodes: int | None = None,
    placement: str | None = None,
    engine_gpus: int | None = None,
    assume: Sequence[str] = (),
    out: Path | None = None,
    scale: str | None = None,
    seed: int = 0,
) -> None:
    """Print the plan of the run description `file`; with `scale`, simulate it on other numbers of GPUs instead.

    Raises DoesNotFit if it cannot run on `gpu`, ConfigError for what is not valid.
    """
    if placement not in (None, *get_args(Placement)):
        raise ConfigError(f"--placement {placement}: expected {' or '.join(get_args(Placement))}")
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--json {out}: expected the name of a .json file")
    config, assumed = load_config(file, overrides, RunConfig), assumptions_of(assume)
    if nodes is None and config.cluster.gpus_per_node:  # what `copd launch` would ask for
        check(config)
        nodes = sum(group.nodes for group in node_groups(config))
    place = cast("Placement | None", placement)
    (made,) = make_plans([(config, model_folder(config, file))], [gpu_of(gpu)], assumed, place, engine_gpus, nodes)
    if scale is not None:
        from copd_megatron.plan.scale import scaling

        scaling(made, config, scale, seed, console, out)
        return
    found = verdict(made, config)
    print_plan(made, found, console)
    if out is not None:
        write_atomic(out, json.dumps(as_data(made, found), indent=1) + "\n")
    if not found.fits:
        raise DoesNotFit(f"{file} does not fit {made.gpu.name}: " + " | ".join(found.problems))
