"""A plan as tables for the terminal and as plain data for `--json`."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from copd_megatron.plan.plan import Plan
from copd_megatron.plan.verdict import Verdict

MEMORY = (
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("resident teacher", "resident"),
    ("activations", "activations"),
    ("recomputed", "recomputed"),
    ("logits", "logits"),
    ("fragmentation", "fragmentation"),
    ("runtime", "runtime"),
    ("engine weights", "engine"),
    ("engine cache", "cache"),
)
TIMES = ("rollout", "score", "train", "communicate", "hand_over", "wait")


def print_plan(plan: Plan, verdict: Verdict, console: Console) -> None:
    """Tables, assumptions, and the verdict last."""
    total, active = plan.shards.total / 1e9, plan.shards.active / 1e9
    console.print(
        f"{plan.model}: {total:.2f} billion parameters, {active:.2f} per token. {plan.gpus} × {plan.gpu.name} "
        f"({plan.gpu.memory / 1e9:.0f} GB), {plan.nodes} nodes."
    )
    console.print(_memory(plan))
    console.print(_engines(plan))
    console.print(_steps(plan))
    console.print(_traffic(plan))
    console.print(
        f"Checkpoint: {plan.checkpoint_bytes / 1e9:,.0f} GB per branch, training waits {plan.checkpoint_stall:.1f} s, "
        f"written after {plan.checkpoint_seconds:,.0f} s. One cycle {_hours(plan.cycle_seconds)}, the run "
        f"{_hours(plan.run_seconds)}. {plan.cut_share:.1%} of the responses are cut."
    )
    console.print(_assumptions(plan))
    console.print(f"Binding: {verdict.binding}. Slowest: {verdict.slowest}.", soft_wrap=True)
    console.print("Expected from these assumptions, not measured on GPUs.")
    for problem in verdict.problems:
        console.print(f"Does not fit: {problem}", soft_wrap=True, style="red")
    if verdict.fits:
        console.print("Fits.", style="green")


def as_data(plan: Plan, verdict: Verdict) -> dict[str, Any]:
    """Everything, in bytes, seconds and operations."""
    data = asdict(replace(plan, every_shards={})) | {"assumed": plan.assumed.model_dump()}
    data.pop("every_shards")
    for branch, plain in zip(plan.branches, data["branches"], strict=True):
        for field in ("speed", "scored"):
            plain.pop(field)
        for rank, row in zip(branch.ranks, plain["ranks"], strict=True):
            row |= {name: getattr(rank, name) for name in ("training", "sampling", "handing_over", "peak")}
        for name, phase in branch.phases.items():
            plain["phases"][name].pop("update")
            plain["phases"][name]["rollouts"] = phase.update.rollouts
            plain["phases"][name]["time"] |= {"total": phase.time.total}
    return data | {"verdict": asdict(verdict) | {"fits": verdict.fits}}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "layout", "name") else "right")
    return table


def _memory(plan: Plan) -> Table:
    ranks = [(branch, rank) for branch in plan.branches for rank in branch.ranks]
    table = _table("Memory of a rank, GB", "", *(f"{branch.name} stage {rank.stage}" for branch, rank in ranks))
    for title, field in MEMORY:
        values = [getattr(rank, field) for _, rank in ranks]
        if any(values):
            table.add_row(title, *map(_gb, values))
    for title, field in (("training", "training"), ("sampling", "sampling"), ("hand-over", "handing_over")):
        table.add_row(f"while {title}", *(_gb(getattr(rank, field)) for _, rank in ranks), style="bold")
    table.add_row("largest micro-batch", *(rank.packing for _, rank in ranks))
    if any(rank.host for _, rank in ranks):
        table.add_row("in host memory", *(_gb(rank.host) for _, rank in ranks))
    return table


def _engines(plan: Plan) -> Table:
    table = _table("Branches and engines", "", "GPUs", "layout", "servers", "GPUs each", "where", "GB a GPU", "at once")
    for branch in plan.branches:
        fleet = branch.fleet
        where = "in the policy's process" if fleet.embedded else fleet.placement
        table.add_row(
            branch.name,
            str(branch.gpus),
            branch.layout,
            str(fleet.servers),
            str(fleet.gpus),
            where,
            _gb(branch.engine),
            str(branch.slots),
        )
    return table


def _steps(plan: Plan) -> Table:
    table = _table(
        "Seconds of an update",
        "",
        *(name.replace("_", "-") for name in TIMES),
        "total",
        "EFLOP",
        "micro-batches",
        "bubble",
        "balance",
        "MFU",
    )
    for branch in plan.branches:
        for name, phase in branch.phases.items():
            time, trained = phase.time, phase.training
            mfu = trained.model_operations / (branch.gpus * plan.gpu.bf16 * (time.train + time.communicate))
            table.add_row(
                f"{branch.name}, {name}",
                *(f"{getattr(time, field):,.1f}" for field in TIMES),
                f"{time.total:,.1f}",
                f"{trained.operations / 1e18:,.1f}",
                str(trained.microbatches),
                f"{trained.bubble:.0%}",
                f"{trained.balance:.2f}",
                f"{mfu:.0%}",
            )
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("Bytes moved in an update of Phase II, GB", "", "name", "ranks", "GB", "seconds", "")
    for branch in plan.branches:
        for transfer in [*branch.phases["exchange"].transfers, branch.hand_over]:
            note = "beside computing" if transfer.hidden else ""
            table.add_row(
                branch.name,
                transfer.name,
                str(transfer.ranks),
                f"{transfer.bytes / 1e9:,.1f}",
                f"{transfer.seconds:,.2f}",
                note,
            )
        if branch.score_answer_bytes:
            table.add_row(branch.name, "scores of its teachers", "", f"{branch.score_answer_bytes / 1e9:,.2f}", "", "")
            table.add_row(branch.name, "what it asks them", "", f"{branch.score_request_bytes / 1e9:,.2f}", "", "")
    return table


def _assumptions(plan: Plan) -> Table:
    table = _table("Assumptions (--assume NAME=VALUE)", "name", "value", "")
    table.columns[2].justify = "left"
    table.columns[2].overflow = "fold"
    for name, field in type(plan.assumed).model_fields.items():
        meaning = " ".join((field.description or "").split())
        table.add_row(name, f"{getattr(plan.assumed, name):g}", meaning)
    table.add_row(plan.gpu.name, "", f"peaks and memory from: {plan.gpu.source}")
    return table


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
