"""A made-up run on disk, written through the same code as a real one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from copd_megatron.observe.environment import record_environment
from copd_megatron.observe.metrics import MetricsWriter, metrics_path
from copd_megatron.observe.timeline import TIMELINE_FILE, Timeline

CONFIG = """\
base: models/mini
branches:
{branches}
rhythm: {{cycles: {cycles}, explore_steps: 15, exchange_steps: 10}}
log: {{overlap_k: 5}}
"""


def write_run(
    run: Path, branches: tuple[str, ...] = ("text", "image"), cycles: int = 4, stop_at: int | None = None
) -> None:
    """A run whose branches drift apart in Phase I and come closer in Phase II; the first branch is the hub."""
    run.mkdir(parents=True)
    listed = "\n".join(f"  - name: {json.dumps(name)}" for name in branches)
    (run / "config.yaml").write_text(CONFIG.format(branches=listed, cycles=cycles))
    record_environment(run)
    for index, branch in enumerate(branches):
        teachers = branches[1:] if index == 0 else branches[:1]
        _write_branch(run, branch, index, teachers, cycles, stop_at or cycles * 25)


def _write_branch(run: Path, branch: str, index: int, teachers: tuple[str, ...], cycles: int, stop_at: int) -> None:
    rng = random.Random(index)
    writer = MetricsWriter(metrics_path(run, branch), branch)
    clock = _Clock()
    timeline = Timeline(run / "branches" / branch / TIMELINE_FILE, clock=clock)
    drift = 0.05
    for step in range(1, stop_at + 1):
        cycle, place = divmod(step - 1, 25)
        phase = "explore" if place < 15 else "exchange"
        drift = drift + 0.02 if phase == "explore" else drift * 0.85 + 0.005
        clock.now += 0.1 if step % 5 == 1 else 0.0
        timeline.begin()
        seconds = {"rollout": 0.14, "score": 0.06 if phase == "exchange" else 0.0, "train": 0.11, "sync": 0.02}
        for activity, length in seconds.items():
            if length:
                with timeline.span(activity):  # type: ignore[arg-type]
                    clock.now += length * rng.uniform(0.8, 1.3)
        with timeline.span("wait"):
            clock.now = max(clock.now, 0.5 * step + rng.uniform(0, 0.02))
        writer.write(
            step,
            cycle,
            phase,
            **{
                "reward/mean": 0.4 + 0.1 * index + 0.25 * (1 - math.exp(-step / 40)) + rng.gauss(0, 0.03),
                "rollout/length": 8 + rng.random(),
                "rollout/truncated": max(0.0, 0.02 + rng.gauss(0, 0.01)),
                "entropy": 1.2 * math.exp(-step / 90) + 0.1 + rng.gauss(0, 0.02),
                "grad_norm": math.nan if step == 12 else abs(rng.gauss(0.8, 0.2)),
                "mismatch/kl": abs(rng.gauss(1e-4, 5e-5)),
                "tokens_per_second": rng.gauss(9000, 700),
                "rss_gib": 1.2 + 0.001 * step,
                "count/groups": 32,
                "count/zero_variance": rng.randrange(9),
                "count/unparsable": rng.randrange(3),
                "count/skipped": int(step == 12),
                **(
                    {"opd/kl": drift * 0.8, "opd/delta": -drift * 0.7, f"overlap/{teachers[0]}": 0.1}
                    if phase == "exchange"
                    else {}
                ),
                **timeline.finish(step),
            },
        )
        if step % 5 == 0:
            probe = {"kl_to_base": 0.004 * step + 0.01 * rng.random(), f"heldout/{branch}": 0.5 + 0.001 * step}
            for rank, teacher in enumerate(teachers):
                probe[f"overlap/{teacher}"] = 0.96 - 0.4 * drift - 0.03 * rank - 0.01 * rng.random()
                probe[f"symkl/{teacher}"] = drift * (1 + 0.3 * rank) + 0.01 * rng.random()
                probe[f"heldout/{teacher}"] = 0.3 + 0.001 * step
                probe[f"support/{teacher}"] = min(1.0, 0.3 * drift + 0.05 * rng.random())
                probe[f"kl_teacher/{teacher}"] = drift * 0.5 + 0.01 * rng.random()
            writer.write(step, cycle, "probe", **probe)
    writer.close()
    timeline.close()


def write_evaluation(run: Path, models: tuple[str, ...] = ("base", "text branch", "image branch", "merged")) -> None:
    """An accuracy table in which every model is a little better than the one before."""
    rows = []
    for index, name in enumerate(models):
        text, image = 0.40 + 0.08 * index, 0.42 + 0.07 * index
        rows.append(
            {
                "name": name,
                "capabilities": {"text": _score(text, 1024), "image": _score(image, 1024)},
                "overall": _score((text + image) / 2, 2048),
            }
        )
    table = {"task": "mini", "n": 1024, "seed": 0, "models": rows, "notes": ["One convention is synthetic."]}
    (run / "evaluation.json").write_text(json.dumps(table))


def _score(accuracy: float, n: int) -> dict[str, float | int]:
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / n)
    return {"accuracy": accuracy, "low": accuracy - half, "high": accuracy + half, "n": n}


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now
