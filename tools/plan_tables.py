"""The tables of docs/scale.md: plans of all shipped configurations, the simulated curve, and the check of memory.

    make plan            (python tools/plan_tables.py --doc docs/scale.md --json docs/benchmarks/scale.json)

The check of memory compares the plan with torch's own count of real forward and backward passes: on a GPU, where there
is one, with its allocator too. It fails where they differ by more than 10%.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from doc_table import put
from rich.console import Console

from copd_megatron.config import RunConfig, load_config
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.check import Comparison, compare
from copd_megatron.plan.hardware import gpu_of
from copd_megatron.plan.plan import Plan, make_plans, model_folder
from copd_megatron.plan.scale import scaling
from copd_megatron.plan.verdict import verdict

ROOT = Path(__file__).parents[1]
FAMILIES = ("qwen3_vl_4b", "qwen3_vl_8b", "qwen3_vl_32b", "qwen3_vl_30b_a3b", "qwen3_vl_235b_a22b")
NODES = {"nodes_80gb": "h100-80", "nodes_141gb": "h200-141"}
SHIPPED = [(ROOT / "configs" / family / f"{nodes}.yaml", gpu) for family in FAMILIES for nodes, gpu in NODES.items()]
"""Configurations and the GPUs that they are for."""
CURVE = SHIPPED[0]
"""Of which the scaling curve is simulated."""
TOLERANCE = 0.10


def plan_table() -> str:
    """Markdown; a configuration that does not fit says so in its last column."""
    configs = [load_config(file, [], RunConfig) for file, _ in SHIPPED]
    folders = [model_folder(config, file) for config, (file, _) in zip(configs, SHIPPED, strict=True)]
    gpus = [gpu_of(gpu) for _, gpu in SHIPPED]
    plans = make_plans(list(zip(configs, folders, strict=True)), gpus, Assumptions())
    columns = ["configuration", "GPUs", "a branch's policy", "its engines", "weights, gradients, optimizer", "training"]
    columns += ["sampling", "Phase I", "Phase II", "hand-over", "checkpoint", "4 cycles", ""]
    lines = ["| " + " | ".join(columns) + " |", "|---|---|---|---|" + "---:|" * 8 + "---|"]
    for (file, _), config, plan in zip(SHIPPED, configs, plans, strict=True):
        fits = "fits" if verdict(plan, config).fits else "**does not fit**"
        lines.append("| " + " | ".join([f"`{file.parent.name}/{file.stem}`", *_cells(plan), fits]) + " |")
    return "\n".join(lines) + "\n"


def _cells(plan: Plan) -> Sequence[str]:
    branch = max(plan.branches, key=lambda one: max(rank.needed for rank in one.ranks))
    rank = max(branch.ranks, key=lambda one: one.needed)
    fleet = branch.fleet
    return (
        f"{plan.gpus} × {plan.gpu.name}",
        f"{branch.gpus}: {branch.layout}",
        f"{fleet.servers} × {fleet.gpus}, {fleet.placement}",
        f"{(rank.weights + rank.gradients + rank.optimizer) / 1e9:.1f} GB",
        f"{rank.training / 1e9:.1f} GB",
        f"{rank.sampling / 1e9:.1f} GB",
        f"{max(one.phases['explore'].time.total for one in plan.branches):,.0f} s",
        f"{max(one.phases['exchange'].time.total for one in plan.branches):,.0f} s",
        f"{branch.hand_over.seconds:.0f} s",
        f"{plan.checkpoint_bytes / 1e9:,.0f} GB",
        f"{plan.run_seconds / 3600:.0f} h",
    )


def memory_rows() -> Iterator[tuple[str, str, str, Comparison]]:
    """(model, micro-batch, recompute, comparison) of real passes of small models, in bfloat16."""
    sys.path[:0] = [str(ROOT / "tests" / "policy"), str(ROOT / "tests")]
    import tiny_qwen3_vl as tiny

    from copd_megatron.policy import platform
    from copd_megatron.policy.qwen3_vl import build_model

    shapes: dict[str, list[tuple[int, list[int], list[Any]]]] = {
        "7 responses, 2 prompts": [(100, [500] * 4, []), (300, [400] * 3, [])],
        "3 responses, 1 prompt": [(500, [600] * 3, [])],
        "1 large picture": [(700, [300, 400], [(1, 32, 48)])],
    }
    for kind, hf in (("dense", tiny.config(vocab=2001)), ("experts", tiny.moe_config())):
        for recompute in ("none", "selective", "full"):
            with tiny.alone() as layout:
                model = build_model(hf, layout, "bf16", recompute)[0].train()  # type: ignore[arg-type]
                for name, shape in shapes.items():
                    batch = tiny.pack([tiny.conversation(seed, *case) for seed, case in enumerate(shape)])
                    on = batch if not platform.on_gpu() else _moved(batch)
                    yield kind, name, recompute, compare(model, on, layout, recompute)  # type: ignore[arg-type]


def _moved(batch: Any) -> Any:
    from copd_megatron.policy.schedule import _on_device

    return _on_device(batch)


def memory_table() -> tuple[str, float]:
    """Markdown, and the largest relative difference."""
    lines = [
        "| model | micro-batch | recompute | kept, MB: plan | torch | | peak, MB: plan | torch | |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    largest = 0.0
    for kind, name, recompute, found in memory_rows():
        kept, peak = (
            planned / measured - 1
            for planned, measured in (
                (found.kept_planned, found.kept_measured),
                (found.peak_planned, found.peak_measured),
            )
        )
        largest = max(largest, abs(kept), abs(peak))
        lines.append(
            f"| {kind} | {name} | {recompute} | {found.kept_planned / 1e6:.1f} | {found.kept_measured / 1e6:.1f} | "
            f"{kept:+.1%} | {found.peak_planned / 1e6:.1f} | {found.peak_measured / 1e6:.1f} | {peak:+.1%} |"
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"On a {device}, bfloat16; largest difference {largest:.1%}.\n\n" + "\n".join(lines) + "\n", largest


def curve(out: Path) -> str:
    """What the simulation prints; its JSON and plot go to `out` and beside it."""
    file, gpu = CURVE
    config = load_config(file, [], RunConfig)
    (plan,) = make_plans([(config, model_folder(config, file))], [gpu_of(gpu)], Assumptions())
    console = Console(width=150, record=True)
    scaling(plan, config, "8..16384", 0, console, out)
    text = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    return f"    copd plan {file.relative_to(ROOT)} --gpu {gpu} --scale 8..16384\n\n```\n{text}\n```\n"


def main() -> None:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doc", type=Path, required=True, help="write the tables here, between the markers")
    parser.add_argument("--json", type=Path, required=True, help="the simulation's numbers; its plot beside it")
    given = parser.parse_args()
    memory, largest = memory_table()
    put(given.doc, "memory", memory)
    put(given.doc, "plan", plan_table())
    put(given.doc, "scale", curve(given.json))
    if largest > TOLERANCE:
        raise SystemExit(f"plan_tables: plan and torch differ by {largest:.1%}, more than {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
