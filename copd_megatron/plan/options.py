"""What `copd plan` takes on the command line. Heavy libraries are imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

_FILE_WIDTH = 150
"""Columns of tables that do not go to a terminal."""


def plan(
    config: Annotated[Path, typer.Argument(help="Run description (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. rl.prompts=64")
    ] = None,
    gpu: Annotated[str, typer.Option(help="h100-80, h200-141 or b200-192, 8 in a node.")] = "h100-80",
    nodes: Annotated[int | None, typer.Option(help="Nodes there are; else those of `cluster`.", min=1)] = None,
    placement: Annotated[
        str | None,
        typer.Option(help="Engines `colocated` on the policy's GPUs or `disaggregated`; by rollout.sglang.sleep."),
    ] = None,
    engine_gpus: Annotated[
        int | None, typer.Option(help="GPUs for each branch's engines, in place of the configuration's.", min=1)
    ] = None,
    assume: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Another assumption; repeatable.")
    ] = None,
    scale: Annotated[
        str | None, typer.Option(metavar="FROM..TO", help="Simulate cycles on so many GPUs instead, e.g. 8..16384.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
    json: Annotated[
        Path | None, typer.Option(help="Write the result here too; a simulation's plot beside it, as .png.")
    ] = None,
) -> None:
    """What a run needs and how long it takes, before anything is launched. Ends with status 1 if it does not fit.

    Needs the base's config.json alone: in the base's folder, or in `model/` beside CONFIG.
    """
    from copd_megatron.plan.command import plan as do

    console = Console()
    do(
        config,
        overrides or [],
        console if console.is_terminal else Console(width=_FILE_WIDTH),
        gpu=gpu,
        nodes=nodes,
        placement=placement,
        engine_gpus=engine_gpus,
        assume=assume or (),
        out=json,
        scale=scale,
        seed=seed,
    )
