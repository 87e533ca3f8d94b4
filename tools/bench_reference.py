"""Seconds of one update of the policy, and of the same update in transformers.

    python tools/bench_reference.py [--steps 30] [--json OUT] [--limit 1.1]

One process, one thread, float32, a Qwen3-VL whose language model has 1.05 M parameters, 4 sequences of 256 tokens
(1,024 tokens a step), turn and turn about. Ours: `Policy.update`, packing included. Theirs: the language model with
`scaled_dot_product_attention` on a batch of 4 rows (no padding, no mask), backward, clipping, torch's fused AdamW.
Both start from the same weights and see the same tokens; that loss and gradients are equal is checked first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from copd_megatron.files import write_atomic
from copd_megatron.policy import layout
from copd_megatron.policy.batching import Sample

sys.path.insert(0, str(Path(__file__).parent))
from bench_model import Shape, cross_entropy, make_samples, write_model

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-4, 0.01, (0.9, 0.95), 1.0
TOLERANCE = 1e-4
"""Largest relative difference of the losses, and of a gradient relative to its largest entry."""
WARM_UP = 3


class Ours:
    """The policy on Megatron's blocks."""

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        from copd_megatron.policy.optimizer import OptimizerSettings
        from copd_megatron.policy.trainer import Policy

        settings = OptimizerSettings(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, clip_grad=CLIP)
        tokens = sum(len(sample.rollout.token_ids) for sample in samples)
        self.policy = Policy(folder, layout.Layout(), settings, "fp32", tokens)
        self.samples = samples

    def step(self) -> float:
        """One update; the loss before it."""
        return self.policy.update(self.samples, cross_entropy)["loss"]

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of the last update by Hugging Face name: weights and gradients change places to be mapped."""
        parameters = [value for value in self.policy.model.parameters() if value.requires_grad]
        weights = [parameter.data.clone() for parameter in parameters]
        for parameter in parameters:
            parameter.data.copy_(parameter.main_grad)
        named = {name: tensor.detach().clone() for name, tensor in self.policy.named_weights()}
        for parameter, weight in zip(parameters, weights, strict=True):
            parameter.data.copy_(weight)
        return named


class Theirs:
    """transformers' language model and torch's optimizer."""

    def __init__(self, folder: Path, samples: Sequence[Sample]) -> None:
        from transformers import Qwen3VLForConditionalGeneration

        self.model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).train()
        tokens = torch.tensor([sample.rollout.prompt.token_ids + sample.rollout.token_ids for sample in samples])
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
        self.parameters = [*self.model.model.language_model.parameters(), *self.model.lm_head.parameters()]
        groups = [
            {"params": [value for value in self.parameters if value.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [value for value in self.parameters if value.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, fused=True)

    def step(self) -> float:
        """One update; the loss before it."""
        self.optimizer.zero_grad()
        hidden = self.model.model.language_model(input_ids=self.inputs, use_cache=False).last_hidden_state
        loss = F.cross_entropy(self.model.lm_head(hidden).flatten(0, 1), self.targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        return loss.item()

    def gradients(self) -> dict[str, torch.Tensor]:
        """Those of the last update, after clipping as ours are."""
        return {name: value.grad for name, value in self.model.named_parameters() if value.grad is not None}


def differences(ours: Ours, theirs: Theirs) -> dict[str, float]:
    """Of one update from the same weights: relative difference of the losses, largest of a gradient."""
    loss, expected = ours.step(), theirs.step()
    found = ours.gradients()
    gradient = max(
        float((found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-12))
        for name, grad in theirs.gradients().items()
    )
    return {"loss": abs(loss - expected) / abs(expected), "gradient": gradient}


def turn_about(steps: int, *sides: Callable[[], float]) -> list[list[float]]:
    """Seconds of each step of each side, one after the other in turn, after warm-up."""
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(WARM_UP + steps):
        for side, step in enumerate(sides):
            start = time.perf_counter()
            step()
            if number >= WARM_UP:
                seconds[side].append(time.perf_counter() - start)
    return seconds


def measure(shape: Shape, sequences: int, length: int, steps: int) -> dict[str, Any]:
    """Check equality, then time; SystemExit where the two do not compute the same."""
    if torch.cuda.is_available():
        sys.exit("bench_reference: compares two programs on one core; hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    torch.set_num_threads(1)
    one = layout.Layout()
    layout.initialize(one)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, shape)
            samples = make_samples(sequences, length, shape.vocabulary)
            ours, theirs = Ours(folder, samples), Theirs(folder, samples)
        different = differences(ours, theirs)
        worst = max(different.values())
        if not worst <= TOLERANCE:
            raise SystemExit(f"bench_reference: not the same computation: {different}, expected ≤ {TOLERANCE:g}")
        mine, other = turn_about(steps, ours.step, theirs.step)
    finally:
        layout.shutdown()
    parameters = sum(value.numel() for value in theirs.parameters)
    return {
        "what": f"{sequences} sequences of {length} tokens ({sequences * length} a step), {parameters / 1e6:.2f} M "
        "parameters, one process, one thread, fp32",
        "machine": f"{machine.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "relative_difference": different,
        "ours": summary(mine),
        "transformers": summary(other),
        "ratio": statistics.median(mine) / statistics.median(other),
    }


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, range and number of steps."""
    return {"seconds": statistics.median(seconds), "range": [min(seconds), max(seconds)], "steps": len(seconds)}


def main() -> None:
    """Measure and print one line per side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each side (default 30)")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--limit", type=float, help="exit with 1 if ours takes more than so many times theirs")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    result = measure(Shape(hidden=given.hidden, layers=given.layers), given.sequences, given.length, given.steps)
    print(result["what"])
    for side in ("ours", "transformers"):
        times = result[side]
        low, high = times["range"]
        print(f"{side:>13}: {1e3 * times['seconds']:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f})")
    print(f"{'ratio':>13}: {result['ratio']:.3f}")
    print("largest relative difference: " + ", ".join(f"{k} {v:.1e}" for k, v in result["relative_difference"].items()))
    if given.json:
        write_atomic(given.json, json.dumps(result, indent=1) + "\n")
    if given.limit is not None and result["ratio"] > given.limit:
        sys.exit(f"bench_reference: {result['ratio']:.3f} times transformers' seconds; the limit is {given.limit:g}")


if __name__ == "__main__":
    main()
