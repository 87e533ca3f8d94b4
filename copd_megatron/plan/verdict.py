"""Whether a plan fits, what is nearest to its limit, and what to change when it does not fit."""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.config.run import RunConfig
from copd_megatron.plan.engines import cache_bytes_per_token
from copd_megatron.plan.memory import RankMemory
from copd_megatron.plan.plan import BranchPlan, Plan


@dataclass(frozen=True)
class Verdict:
    """`problems`: why the run cannot start, each with what to change; `binding`: what is nearest to a limit, in words;
    `slowest`: the activity that takes most of a cycle."""

    problems: tuple[str, ...]
    binding: str
    slowest: str

    @property
    def fits(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def verdict(plan: Plan, config: RunConfig) -> Verdict:
    """Of a plan."""
    problems = [problem for branch in plan.branches for problem in _branch_problems(branch, plan, config)]
    if plan.given_nodes is not None and plan.nodes > plan.given_nodes:
        problems.append(
            f"the run takes {plan.gpus} GPUs, {plan.nodes} nodes, and --nodes gives it {plan.given_nodes}: make "
            "branches[].parallel.world or rollout.sglang.servers smaller, or let engines share the policy's GPUs "
            "(--placement colocated)"
        )
    branch, rank = max(
        ((branch, rank) for branch in plan.branches for rank in branch.ranks), key=lambda pair: pair[1].needed
    )
    binding = (
        f"GPU memory of {branch.name}, stage {rank.stage}, while {rank.peak_phase}: "
        f"{_gb(rank.needed)} of {_gb(plan.gpu.memory)} GB, most of it {_largest(rank)}"
    )
    return Verdict(tuple(problems), binding, _slowest(plan, config))


def _branch_problems(branch: BranchPlan, plan: Plan, config: RunConfig) -> list[str]:
    problems = []
    worst = max(branch.ranks, key=lambda rank: rank.peak)
    if worst.peak > plan.gpu.memory:
        problems.append(
            f"branch {branch.name}: a rank of stage {worst.stage} needs {_gb(worst.peak)} GB while "
            f"{worst.peak_phase}, {plan.gpu.name} has {_gb(plan.gpu.memory)}: "
            + "; ".join(_remedies(worst, branch, config))
        )
    if not branch.fleet.embedded:
        longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
        room = branch.cache / cache_bytes_per_token(plan.shards.geometry, branch.fleet)
        if room < longest:
            problems.append(
                f"branch {branch.name}: an engine of {branch.fleet.gpus} GPUs has room for {int(room):,} tokens of "
                f"keys and values, one sequence can have {longest:,}: raise rollout.sglang.tensor_parallel, place "
                "engines on GPUs of their own (--placement disaggregated), or lower data.max_prompt_tokens or "
                "rollout.max_new_tokens"
            )
    return problems


def _remedies(rank: RankMemory, branch: BranchPlan, config: RunConfig) -> list[str]:
    """What would make room, the largest item first."""
    precision, parallel = config.precision, config.branch(branch.name).parallel
    options: dict[str, list[str]] = {
        "activations": [
            "set precision.recompute: full" if precision.recompute != "full" else "",
            "set parallel.sequence_parallel: true" if parallel.tp > 1 and not parallel.sequence_parallel else "",
            f"lower precision.max_tokens_per_microbatch = {precision.max_tokens_per_microbatch} (and data."
            "max_prompt_tokens or rollout.max_new_tokens with it), or raise parallel.cp",
        ],
        "recomputed": ["raise parallel.tp or parallel.cp"],
        "logits": ["raise parallel.tp, which divides the vocabulary"],
        "optimizer": [
            "set optimizer.distributed: true" if not config.optimizer.distributed else "",
            "add replicas (a larger parallel.world), or set optimizer.offload: true",
        ],
        "weights": ["raise parallel.tp, parallel.pp or, for experts, parallel.ep"],
        "gradients": ["raise parallel.tp, parallel.pp or, for experts, parallel.ep"],
        "engine": ["place engines on GPUs of their own (--placement disaggregated)"],
        "cache": ["lower rollout.sglang.args.mem-fraction-static"],
        "resident": ["set teacher.where: engine"],
    }
    sizes = sorted(options, key=lambda item: -getattr(rank, item))
    found = dict.fromkeys(text for item in sizes for text in options[item] if text and getattr(rank, item) > 0)
    return list(found)[:3]


def _largest(rank: RankMemory) -> str:
    items = ["weights", "gradients", "optimizer", "resident"]
    items += ["activations", "recomputed", "logits"] if rank.peak_phase == "training" else ["engine"]
    largest = max(items, key=lambda item: getattr(rank, item))
    return f"{largest} ({_gb(getattr(rank, largest))})"


def _slowest(plan: Plan, config: RunConfig) -> str:
    steps = {"explore": config.rhythm.explore_steps, "exchange": config.rhythm.exchange_steps}
    spent: dict[str, float] = {}
    for branch in plan.branches:
        for phase, number in steps.items():
            time = branch.phases[phase].time
            for name in ("rollout", "score", "train", "communicate", "hand_over", "wait"):
                spent[name] = spent.get(name, 0.0) + number * getattr(time, name)
    total = sum(spent.values())
    name = max(spent, key=lambda item: spent[item])
    return f"{name.replace('_', '-')}: {spent[name] / total:.0%} of the branches' time"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
