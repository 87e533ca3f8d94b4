"""Two traps of distillation on a teacher's top-k, as a plot.

    python tools/kernel_traps.py --out docs/images/kernel_traps.png

One state with 64 tokens; a student and a teacher at random, the teacher's top 8 known. The student's logits go down a
gradient, of

    loss               top-k KL with a tail bucket, as a loss (`copd_kernels.reference.topk_kl`)
    advantage          the same number as an advantage: policy gradient on sampled tokens, 8 a step
    truncated          Σ over the top-k of p (log p − log q), without the tail

An advantage that does not depend on the action has no gradient in expectation, and what is left is noise. The truncated
sum pays for draining the student's top-k: it falls below 0 while the distance over the whole vocabulary grows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import from_checkout  # noqa: F401 - makes the project importable
import torch

from copd_kernels import reference
from copd_megatron.files import write_atomic
from copd_megatron.observe.plot_style import COLOURS, LINES, legend_above, panels, png, style

TOKENS, TOP, STEPS, RATE, SAMPLES = 64, 8, 300, 0.5, 8

Curves = dict[str, list[float]]


def start(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1, 64] of student and teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher, noise = torch.randn(2, 1, TOKENS, generator=generator, dtype=torch.float64)
    return 2 * teacher + noise, 2 * teacher


def descend(what: str, seed: int = 0) -> Curves:
    """Per step: "value" of what is minimised, "kl" over the whole vocabulary, "mass" of the student on the top-k."""
    student, teacher = start(seed)
    logprobs, ids = torch.log_softmax(teacher, dim=-1).topk(TOP)
    generator = torch.Generator().manual_seed(seed + 1)
    curves: Curves = {"value": [], "kl": [], "mass": []}
    for _ in range(STEPS + 1):
        student.requires_grad_()
        value = reference.topk_kl(student, ids, logprobs, "reverse").sum()
        top = reference.logprobs_at(student, ids)[0]
        if what == "truncated":
            value = (top.exp() * (top - logprobs)).sum()
        surrogate = value
        if what == "advantage":
            sampled = torch.multinomial(torch.softmax(student.detach(), -1), SAMPLES, True, generator=generator)
            # The advantage is −KL: more where the distance is smaller. It is the same for every token of the state.
            surrogate = value.detach() * reference.logprobs_at(student, sampled)[0].mean()
        (gradient,) = torch.autograd.grad(surrogate, student)
        curves["value"].append(value.item())
        curves["kl"].append(reference.token_kl(student.detach(), teacher, "reverse").item())
        curves["mass"].append(top.exp().sum().item())
        student = student.detach() - RATE * gradient
    return curves


def draw(seed: int = 0) -> bytes:
    """The figure as a PNG file."""
    curves = {what: descend(what, seed) for what in ("loss", "advantage", "truncated")}
    with style():
        figure, axes = panels(1, 3, 3.8)
        names = {"loss": "as a loss, with tail", "advantage": "as an advantage", "truncated": "truncated, no tail"}
        for number, (what, label) in enumerate(names.items()):
            for axis, key in zip(axes, ("kl", "value", "mass"), strict=True):
                axis.plot(curves[what][key], label=label, color=COLOURS[number], linestyle=LINES[number])
        for axis, title in zip(
            axes, ("KL(student ‖ teacher), nats", "What is minimised", f"Student's mass on the top-{TOP}"), strict=True
        ):
            axis.set_title(title)
            axis.set_xlabel("step")
        axes[1].axhline(0, color="#888888", linewidth=0.8)
        legend_above(figure, axes[:1])
        return png(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="two traps of distillation on a teacher's top-k, as a plot")
    parser.add_argument("--out", default="docs/images/kernel_traps.png", help="PNG file to write")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write_atomic(options.out, draw(options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
