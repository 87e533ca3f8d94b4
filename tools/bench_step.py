"""Seconds of a GRPO step and of an OPD step: ours, and TRL's trainers on the same model, prompts and lengths.

    make bench        (python tools/bench_step.py --rounds 3 --out docs/benchmarks/bench_step.json)

One process and one thread each, turn and turn about. A step is 32 prompts x 8 rollouts x 16 tokens, from drawing the
rollouts to having the updated weights in the engine; the OPD step is teacher-scored on every token's full distribution
on both sides. Equality is checked first: on the same tokens our policy, our engine and TRL's model give the same
log-probabilities. Ratios compare medians; the first step of every process is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ACTIVITIES = ("rollout", "score", "train", "sync", "wait")
PROMPTS, GROUP = 32, 8
TOLERANCE = 1e-4


def our_half(model: Path, prompts: Sequence[str], steps: int, tokens: int) -> dict[str, Any]:
    """Time our steps in this process, with the parts that `copd train` uses."""
    import torch

    torch.set_num_threads(1)
    from copd_megatron.objectives.branch_loss import branch_loss
    from copd_megatron.objectives.settings import LossSettings
    from copd_megatron.observe.timeline import Timeline
    from copd_megatron.policy import layout
    from copd_megatron.policy.batching import NATIVE
    from copd_megatron.policy.optimizer import OptimizerSettings
    from copd_megatron.policy.trainer import Policy
    from copd_megatron.rewards.pool import RewardPool
    from copd_megatron.rollout.embedded import EmbeddedEngine
    from copd_megatron.rollout.types import Prompt, Sampling
    from copd_megatron.worker.actor import Actor, Teacher
    from copd_megatron.worker.snapshots import Snapshots

    one = layout.Layout()
    layout.initialize(one)
    policy = Policy(model, one, OptimizerSettings(lr=1e-4), "fp32", 8192)
    engine, peer = EmbeddedEngine("student", model), EmbeddedEngine("teacher", model)
    batch = [
        Prompt(f"bench:{index}", "text", tuple(engine.tokenizer(text)["input_ids"]), "", "exact", text)
        for index, text in enumerate(prompts)
    ]
    sampling = Sampling(max_new_tokens=tokens, stop_token_ids=(), n=GROUP)
    teacher = Teacher("teacher", 0, peer, top_k=1 << 20, temperature=1.0)
    actor = Actor("student", 0, 0, engine, {}, {"teacher": teacher}, RewardPool(), sampling, normalise_std=True)
    loss = partial(branch_loss, settings=LossSettings(opd_loss="topk_forward", overlap_k=5, teachers=1))
    timeline = Timeline()
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder))

        def grpo(step: int) -> None:
            with timeline.span("rollout"):
                rollouts = engine.generate(batch, sampling, seed=step)
            with timeline.span("score"):
                graded, _ = actor.grade(rollouts)
                samples, _ = actor.native_samples(_spread(graded))
            with timeline.span("train"):
                policy.update(samples, loss, {NATIVE: len(rollouts)})
            with timeline.span("sync"):
                engine.update_weights(policy.named_weights(), policy.version)

        def opd(step: int) -> None:
            with timeline.span("rollout"):
                rollouts = engine.generate(batch, sampling, seed=step)
            with timeline.span("score"):
                scored = teacher.score(rollouts, peer.version)
            with timeline.span("train"):
                policy.update(actor.cross_samples({"teacher": scored}), loss, {0: len(rollouts)})
            with timeline.span("sync"):
                engine.update_weights(policy.named_weights(), policy.version)
                snapshots.publish("teacher", policy.version, policy.named_weights())
                peer.update_weights(snapshots.weights("teacher", policy.version), policy.version)

        probe = engine.generate(batch, sampling, seed=0)
        from copd_megatron.policy.batching import Sample

        trained = policy.logprobs([Sample(rollout) for rollout in probe])
        result: dict[str, Any] = {
            "tokens": [list(rollout.token_ids) for rollout in probe],
            "engine_logprobs": [rollout.logprobs.tolist() for rollout in probe],
            "policy_logprobs": [logprobs.tolist() for logprobs in trained],
        }
        for name, step_of in (("grpo", grpo), ("opd", opd)):
            times = []
            for step in range(steps):
                timeline.begin()
                step_of(step + 1)
                times.append(timeline.finish(step))
            result[name] = [seconds["time/step"] for seconds in times]
            result[f"{name}_split"] = {
                activity: statistics.median(seconds[f"time/{activity}"] for seconds in times[1:])
                for activity in ACTIVITIES
            }
    actor.rewards.close()
    return result


def _spread(graded: Sequence[Any]) -> list[Any]:
    """Rewards that leave no group without variance, so that no sample is left out of the timed update."""
    from dataclasses import replace

    return [replace(rollout, reward=float(index % 2)) for index, rollout in enumerate(graded)]


def peer_half(model: Path, prompts: Path, steps: int, tokens: int) -> dict[str, Any]:
    """TRL's times, from a process of its own."""
    return _run([str(Path(__file__).with_name("bench_step_trl.py")), str(model), "--prompts", str(prompts),
                 "--steps", str(steps), "--tokens", str(tokens), "--group", str(GROUP)])  # fmt: skip


def _run(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def largest_difference(model: Path, prompts: Sequence[str], ours: dict[str, Any]) -> float:
    """Largest |Δlogprob| between our two models and the one that TRL trains, on the same tokens."""
    import torch

    sys.path.insert(0, str(Path(__file__).parent))
    from bench_step_trl import text_model
    from transformers import AutoTokenizer

    peer, tokenizer = text_model(model).eval(), AutoTokenizer.from_pretrained(model)
    worst = 0.0
    for index, response in enumerate(ours["tokens"]):
        ids = [*tokenizer(prompts[index // GROUP])["input_ids"], *response]
        with torch.no_grad():
            logprobs = peer(torch.tensor([ids])).logits.log_softmax(-1)[0, -len(response) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
        for kind in ("engine_logprobs", "policy_logprobs"):
            worst = max(worst, float((torch.tensor(ours[kind][index]) - expected).abs().max()))
    return worst


def main() -> None:
    """Run both halves in turn, check equality, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ours:
        texts = json.loads(arguments.prompts.read_text())
        print(json.dumps(our_half(arguments.ours, texts, arguments.steps, arguments.tokens)))
        return

    from copd_megatron.data.mini.model import build

    console = Console(width=max(Console().width, 130))  # eleven columns
    draw = random.Random(0)
    texts = [
        draw.choice(("sum", "dif", "srt", "max")) + " " + "".join(str(draw.randrange(10)) for _ in range(4)) + "="
        for _ in range(PROMPTS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = Path(folder) / "model", Path(folder) / "prompts.json"
        build(model, seed=0)
        prompts.write_text(json.dumps(texts))
        ours, peers = [], []
        for number in range(arguments.rounds):
            console.print(f"round {number + 1} of {arguments.rounds}")
            ours.append(_run([__file__, "--ours", str(model), "--prompts", str(prompts),
                              "--steps", str(arguments.steps), "--tokens", str(arguments.tokens)]))  # fmt: skip
            peers.append(peer_half(model, prompts, arguments.steps, arguments.tokens))
        difference = largest_difference(model, texts, ours[0])
    if difference > TOLERANCE:
        raise SystemExit(f"not the same computation: largest |Δlogprob| {difference:.1e}, expected ≤ {TOLERANCE:g}")
    summary = _summary(ours, peers, difference, arguments.tokens)
    _print(console, summary)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n")


def _summary(ours: list[dict[str, Any]], peers: list[dict[str, Any]], difference: float, tokens: int) -> dict[str, Any]:
    samples = PROMPTS * GROUP
    summary: dict[str, Any] = {
        "what": f"{PROMPTS} prompts x {GROUP} rollouts x {tokens} tokens, one process, one thread, fp32",
        "machine": f"{machine.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "largest_logprob_difference": difference,
    }
    for name in ("grpo", "opd"):
        mine = [seconds for run in ours for seconds in run[name][1:]]
        theirs = [seconds for run in peers for seconds in run[name][1:]]
        summary[name] = {
            "ours_seconds": statistics.median(mine),
            "ours_range": [min(mine), max(mine)],
            "trl_seconds": statistics.median(theirs),
            "trl_range": [min(theirs), max(theirs)],
            "ratio": statistics.median(mine) / statistics.median(theirs),
            "ours_samples_per_second": samples / statistics.median(mine),
            "trl_samples_per_second": samples / statistics.median(theirs),
            "split": {
                activity: statistics.median(run[f"{name}_split"][activity] for run in ours) for activity in ACTIVITIES
            },
        }
    return summary


def _print(console: Console, summary: dict[str, Any]) -> None:
    table = Table(title=summary["what"])
    for column in ("step", *ACTIVITIES, "ours, s", "TRL, s", "ours, samples/s", "TRL, samples/s", "ours : TRL"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name in ("grpo", "opd"):
        row = summary[name]
        table.add_row(
            name.upper(),
            *(f"{row['split'][activity]:.3f}" for activity in ACTIVITIES),
            f"{row['ours_seconds']:.3f}",
            f"{row['trl_seconds']:.3f}",
            f"{row['ours_samples_per_second']:.0f}",
            f"{row['trl_samples_per_second']:.0f}",
            f"{row['ratio']:.2f}",
        )
    console.print(table)
    console.print(
        f"largest |Δlogprob| between policy, engine and TRL's model: {summary['largest_logprob_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
