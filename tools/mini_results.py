"""Measure the mini suite for several seeds and write docs/mini_results.md: CoPD beside its controls.

    .venv/bin/python tools/mini_results.py --seeds 0 1 2

Per seed it makes the base, trains `configs/mini/text_image.yaml` and the control `configs/mini/merge_only.yaml` (the
same branches, data and updates, never taught by each other), and sets both evaluations in one table. Runs that are
there already are not repeated. Nothing in the page is written by hand except its prose, which is below.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from copd_megatron.files import write_atomic
from copd_megatron.observe.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
BRANCHES = ("text", "image")

HEAD = """# The mini suite: CoPD beside its controls

Written by `python tools/mini_results.py --seeds {seeds}` from the runs' own `evaluation.json` and `metrics.jsonl`.

{task}

Every model of a seed comes from the same base, and every branch makes {steps} updates of {rollouts} rollouts, with
teachers (CoPD) or without (the experts). Greedy accuracy in % on the test split with 95% intervals, {problems} problems
per capability; *overall* is the unweighted mean of the capabilities.
"""

VERDICTS = """## What the tables say

Overall accuracy of the merged model minus that of …, in points:

| seed | the base | intervals apart | the experts' mean | the merged experts | the better branch |
|---|---:|---|---:|---:|---:|
{rows}

*The experts' mean* is the mean of the two experts' overall accuracy, *the better branch* the better of CoPD's own two.
On its own capability an expert that only ever trained on it can stay ahead of the merged model, and where the last
column is negative, averaging has lost something that one branch had learned from both.
"""

DRIFT = """## Drift between the branches over Phase II

Probes on {prompts} validation prompts per capability at the first and last update of each Phase II, mean of both
directions. Symmetric KL in nats per token, overlap@{k} as a share.

| seed | cycle | symmetric KL, start → end | overlap@{k}, start → end |
|---|---|---:|---:|
{rows}

{summary}

![Drift, seed {seed}](images/drift_seed{seed}.png)
"""


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "mini_results.md")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        _command("tools/mini_base.py", "--seed", str(seed))
        for name in ("text_image", "merge_only"):
            if not (_run_dir(name, seed) / "evaluation.json").exists():
                _command("-m", "copd_megatron.cli", "train", f"configs/mini/{name}.yaml", f"seed={seed}")
    write_atomic(arguments.out, page(arguments.seeds))
    images = arguments.out.parent / "images"
    images.mkdir(exist_ok=True)
    first = arguments.seeds[0]
    for name in ("drift", "reward", "accuracy"):
        source = _run_dir("text_image", first) / "plots" / f"{name}.png"
        if source.exists():
            shutil.copyfile(source, images / f"{name}_seed{first}.png")
    print(arguments.out)


def page(seeds: list[int]) -> str:
    """The whole page as Markdown."""
    runs = {seed: {name: _read(_run_dir(name, seed)) for name in ("text_image", "merge_only")} for seed in seeds}
    any_run = runs[seeds[0]]["text_image"]
    config = any_run["config"]
    rhythm, rl = config["rhythm"], config["rl"]
    parts = [
        HEAD.format(
            seeds=" ".join(map(str, seeds)),
            task=any_run["evaluation"]["task"],
            steps=rhythm["cycles"] * (rhythm["explore_steps"] + rhythm["exchange_steps"]),
            rollouts=rl["prompts"] * rl["group"],
            problems=any_run["evaluation"]["n"],
        ),
        VERDICTS.format(rows="\n".join(_verdict(seed, runs[seed]) for seed in seeds)),
        *(_table(seed, runs[seed]) for seed in seeds),
    ]
    rows, falls, holds = _drift(seeds, runs)
    parts.append(
        DRIFT.format(
            prompts=config["log"]["probe_prompts"],
            k=config["log"]["overlap_k"],
            rows="\n".join(rows),
            seed=seeds[0],
            summary=(
                f"Symmetric KL falls in {falls} of {len(rows)} cycles; overlap rises, or holds to 0.005, in {holds}."
            ),
        )
    )
    return "\n".join(parts)


def _models(run: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows of the joint table: CoPD's models and the control's, by the names they have there."""
    copd = {model["name"]: model for model in run["text_image"]["evaluation"]["models"]}
    control = {model["name"]: model for model in run["merge_only"]["evaluation"]["models"]}
    return {
        "base": copd["base"],
        **{f"{name} expert alone": control[f"{name} branch"] for name in BRANCHES},
        "merge of the experts": control["merged"],
        **{f"CoPD {name} branch": copd[f"{name} branch"] for name in BRANCHES},
        "**CoPD merged**": copd["merged"],
    }


def _table(seed: int, run: dict[str, dict[str, Any]]) -> str:
    lines = [f"## Seed {seed}", "", "| model | text | image | overall |", "|---|---:|---:|---:|"]
    for name, model in _models(run).items():
        scores = [model["capabilities"][capability] for capability in BRANCHES] + [model["overall"]]
        cells = [f"{100 * s['accuracy']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]" for s in scores]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seconds = {name: run[name]["seconds"] for name in run}
    lines += ["", f"Training took {seconds['text_image']:.0f} s (CoPD) and {seconds['merge_only']:.0f} s (experts) on "
              "two cores, both branches at once.", ""]  # fmt: skip
    return "\n".join(lines)


def _verdict(seed: int, run: dict[str, dict[str, Any]]) -> str:
    models = {name: model["overall"] for name, model in _models(run).items()}
    merged, base = models["**CoPD merged**"], models["base"]
    experts = sum(models[f"{name} expert alone"]["accuracy"] for name in BRANCHES) / len(BRANCHES)
    branch = max(models[f"CoPD {name} branch"]["accuracy"] for name in BRANCHES)
    others = (base["accuracy"], experts, models["merge of the experts"]["accuracy"], branch)
    above_base, *rest = (f"{100 * (merged['accuracy'] - other):+.1f}" for other in others)
    apart = "yes" if merged["low"] > base["high"] else "no"
    return f"| {seed} | {above_base} | {apart} | {' | '.join(rest)} |"


def _drift(seeds: list[int], runs: dict[int, dict[str, dict[str, Any]]]) -> tuple[list[str], int, int]:
    rows, falls, holds = [], 0, 0
    for seed in seeds:
        run = runs[seed]["text_image"]
        rhythm = run["config"]["rhythm"]
        length = rhythm["explore_steps"] + rhythm["exchange_steps"]
        for cycle in range(rhythm["cycles"]):
            ends = cycle * length + rhythm["explore_steps"], (cycle + 1) * length
            kl = [_mean(run["metrics"], step, "symkl/") for step in ends]
            overlap = [_mean(run["metrics"], step, "overlap/") for step in ends]
            falls += kl[1] < kl[0]
            holds += overlap[1] >= overlap[0] - 0.005
            rows.append(f"| {seed} | {cycle + 1} | {kl[0]:.3f} → {kl[1]:.3f} | {overlap[0]:.3f} → {overlap[1]:.3f} |")
    return rows, falls, holds


def _mean(metrics: list[dict[str, Any]], step: int, prefix: str) -> float:
    """Mean over all directed edges of a probe metric."""
    values = [
        value
        for line in metrics
        if line["phase"] == "probe" and line["step"] == step
        for key, value in line.items()
        if key.startswith(prefix)
    ]
    return sum(values) / len(values)


def _read(run: Path) -> dict[str, Any]:
    import yaml

    metrics = read_metrics(run)
    times = [line["time"] for line in metrics]
    return {
        "evaluation": json.loads((run / "evaluation.json").read_text()),
        "config": yaml.safe_load((run / "config.yaml").read_text()),
        "metrics": metrics,
        "seconds": max(times) - min(times),
    }


def _run_dir(name: str, seed: int) -> Path:
    return ROOT / "runs" / "mini" / f"{name}_seed{seed}"


def _command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
