"""A comparison of two branches whose runs are made up, written as real ones are."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

from copd_megatron.budget import write_summary
from copd_megatron.compare.settings import Comparison
from copd_megatron.config import load_config, save_config
from copd_megatron.run_folder import RunFolder

BRANCHES = [{"name": name, "data": {"mini": {"modality": name}}} for name in ("text", "image")]
DESCRIPTION = {
    "reference": "CoPD",
    "seeds": [0, 1],
    "replicates": 200,
    "common": {
        "base": "bases/seed_{seed}",
        "branches": BRANCHES,
        "rhythm": {"cycles": 1, "exchange_steps": 5},
        "log": {"overlap_k": 5},
    },
    "arms": [
        {
            "name": "experts",
            "settings": {"method": "merge_only", "rhythm": {"explore_steps": 10, "exchange_steps": 0}},
            "rows": [
                {"label": "base", "model": "base"},
                {"label": "text expert", "model": "text branch", "equal_budget": False},
                {"label": "merge without OPD", "model": "merged", "equal_budget": False},
            ],
        },
        {
            "name": "mopd",
            "experts": "experts",
            "settings": {"method": "mopd", "rhythm": {"explore_steps": 0, "exchange_steps": 10}},
            "rows": [{"label": "MOPD", "model": "mopd branch"}],
        },
        {"name": "copd", "rows": [{"label": "CoPD", "model": "merged", "ratio": 1.0}]},
        {"name": "slow", "rows": [{"label": "CoPD 2 : 1", "model": "merged", "ratio": 2.0}]},
    ],
}


def describe(folder: Path, **changes) -> Path:
    """The description as a file."""
    file = folder / "compare.yaml"
    file.write_text(yaml.safe_dump({**DESCRIPTION, "out": str(folder / "out"), **changes}))
    return file


def comparison(folder: Path, **changes) -> Comparison:
    return load_config(describe(folder, **changes), [], Comparison)


def make_up(comparison: Comparison, arm_name: str, seed: int, accuracy: float, updates: int) -> None:
    """A finished run of an arm, each branch with so many updates."""
    arm = next(arm for arm in comparison.arms if arm.name == arm_name)
    config = comparison.run(arm, seed)
    folder = RunFolder(config.run_dir)
    folder.path.mkdir(parents=True)
    save_config(config, folder.config_file)
    branches = [branch.name for branch in config.trained]
    models = ["base", *(f"{name} branch" for name in branches), *(["merged"] if len(branches) > 1 else [])]
    outcomes, table = {}, []
    for model in models:
        draw = random.Random(f"{arm_name} {seed} {model}")
        share = 0.4 if model == "base" else accuracy
        outcomes[model] = {name: [[float(draw.random() < share), 1] for _ in range(100)] for name in ("text", "image")}
        scores = {
            name: {"accuracy": (mean := sum(pair[0] for pair in pairs) / 100), "low": mean - 0.1, "high": mean + 0.1}
            for name, pairs in outcomes[model].items()
        }
        table.append({"name": model, "capabilities": scores})
    folder.outcomes.write_text(json.dumps(outcomes))
    evaluation = {"task": "mini suite; SYNTHETIC convention", "n": 100, "seed": seed, "models": table}
    folder.evaluation.write_text(json.dumps(evaluation))
    for name in branches:
        peer = {"text": "image", "image": "text"}.get(name)
        exchange = config.rhythm.exchange_steps and 5
        lines = [{"branch": name, "cycle": 0, "phase": "explore" if step <= updates - exchange else "exchange",
                  "step": step, "count/rollouts": 8, "count/rollout_tokens": 40, "time/step": 1.0}
                 for step in range(1, updates + 1)]  # fmt: skip
        lines += [{"branch": name, "cycle": 0, "phase": "probe", "step": step, "kl_to_base": step / 100,
                   **({f"overlap/{peer}": 1 - step / 50, f"symkl/{peer}": step / 20,
                       f"heldout/{peer}": step / 100} if peer else {})}
                  for step in range(0, updates + 1, 5)]  # fmt: skip
        file = folder.branch(name) / "metrics.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_summary(config, folder)
