"""Of `tools/gpu_check.py`: training steps of a stack of layers as the policy has them.

The model is the policy's own (`Qwen3VLModel`, with its settings and layer specs, and a vision tower that is left
aside), its weights are the same in every precision, and so are the data: sequences in which a token says much about
the next, so that there is something to learn.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bench_model import RESERVED, Shape, cross_entropy, model_config, samples_of
from gpu_check_attention import uneven_lengths
from gpu_check_timing import NotRun, Sizes, one
from torch import Tensor

from copd_megatron.policy import platform
from copd_megatron.policy.batching import NATIVE, pack
from copd_megatron.policy.context import Stripe, share
from copd_megatron.policy.fp8 import Fp8, fp8_options, token_multiple, why_not
from copd_megatron.policy.layout import Layout
from copd_megatron.policy.packed import MicroBatch
from copd_megatron.policy.schedule import sum_gradients, train_pass
from copd_megatron.randomness import generator

LEARNING_RATE = 1e-3
BATCHES = 4
"""Different batches, which come in turn."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Largest relative difference of the loss between packed and padded."""
NORM_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
"""The same of the gradient's norm."""


class Stack:
    """Model and optimizer in one precision; `weights` by name are taken over, if given."""

    def __init__(
        self,
        shape: Shape,
        params: str,
        recipe: Fp8 = "none",
        weights: Mapping[str, Tensor] | None = None,
        kept: int = 0,
    ) -> None:
        """`kept` layers at each end stay in bf16 (none under `delayed`). ConfigError where the recipe cannot be."""
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        from copd_megatron.policy.qwen3_vl import Qwen3VLModel
        from copd_megatron.policy.qwen3_vl.config import settings, torch_dtype

        built = settings(model_config(shape), Layout(), params)  # type: ignore[arg-type]
        ends = None if recipe == "delayed" else kept
        options = fp8_options(recipe, layers=shape.layers, bf16_layers_at_start=ends, bf16_layers_at_end=ends)
        config = dataclasses.replace(built.text_config, **options)
        torch.manual_seed(0)
        dtype = torch_dtype(params)  # type: ignore[arg-type]
        model = Qwen3VLModel(dataclasses.replace(built, text_config=config), True, True)
        model = model.to(device=platform.device(), dtype=dtype)
        if weights is not None:
            for name, parameter in model.named_parameters():
                parameter.data.copy_(weights[name])
        sum_gradients(config)
        self.config = config
        self.multiple = token_multiple(recipe)
        self.weights = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=LEARNING_RATE,
                weight_decay=0.01,
                adam_beta2=0.95,
                clip_grad=1.0,
                bf16=params == "bf16",
                params_dtype=dtype,
            ),
            [self.model],
        )

    def step(self, batch: MicroBatch) -> tuple[float, float]:
        """One update: loss and gradient norm before it."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss, _ = train_pass([self.model], [share(batch, Stripe(), self.multiple)], cross_entropy)
        done, norm, _ = self.optimizer.step()
        if not done or not math.isfinite(loss):
            raise RuntimeError(f"the update failed: loss {loss}, gradient norm {norm}")
        return loss, float(norm)


def batch_of(lengths: Sequence[int], vocabulary: int, seed: int) -> MicroBatch:
    """One micro-batch of sequences of these lengths; a token determines the next up to one of four."""
    draw, ids = generator(seed, "gpu check"), vocabulary - RESERVED
    rows = []
    for length in lengths:
        noise = torch.randint(0, 4, (length + 1,), generator=draw).tolist()
        row = [int(torch.randint(0, ids, (), generator=draw))]
        for step in noise[1:]:
            row.append((5 * row[-1] + 7 + step) % ids)
        rows.append(row)
    return _packed(rows)


def padded(batch: MicroBatch) -> MicroBatch:
    """The same sequences filled up to the longest, as a batch of equal rows has them; the filling has weight 0."""
    prompts = batch.segments.prompt_lengths.tolist()
    starts = [0]
    for length in prompts[:-1]:
        starts.append(starts[-1] + length)
    responses: list[list[int]] = [[] for _ in prompts]
    for token, number in zip(batch.targets.tolist(), batch.sequence.tolist(), strict=True):
        responses[number].append(token)
    longest = max(len(response) for response in responses)
    rows = [
        [int(batch.token_ids[start]), *response, *[0] * (longest - len(response))]
        for start, response in zip(starts, responses, strict=True)
    ]
    filled = _packed(rows)
    real = torch.cat([torch.arange(longest) < len(response) for response in responses])
    weight = torch.zeros(len(real))
    weight[real] = batch.signals.weight
    return dataclasses.replace(filled, signals=dataclasses.replace(filled.signals, weight=weight))


def _packed(rows: Sequence[Sequence[int]]) -> MicroBatch:
    samples = samples_of(rows)
    tokens = sum(len(row) - 1 for row in rows)
    (batch,) = pack(
        samples, tokens, {NATIVE: len(samples)}, lambda prompt: torch.zeros(3, 1, dtype=torch.int64), media_token_ids=()
    ).microbatches
    return batch


def training_part(
    sizes: Sizes,
    params: str,
    recipe: Fp8,
    peak_tflops: float | None,
    weights: Mapping[str, Tensor] | None,
    expected: Sequence[float] | None,
    kept: int = 0,
) -> tuple[dict[str, Any], Stack]:
    """Speed and memory of steps, and the distance of their losses from `expected` (those of bf16)."""
    if recipe != "none" and (missing := why_not(recipe)):
        raise NotRun(missing)
    device, shape = platform.device(), sizes.shape
    lengths = [sizes.length] * sizes.sequences
    batches = [batch_of(lengths, shape.vocabulary, seed) for seed in range(BATCHES)]
    stack = Stack(shape, params, recipe, weights, kept)
    losses, times = [], []

    def step(number: int) -> None:
        losses.append(stack.step(batches[number % BATCHES])[0])

    for number in range(sizes.steps):
        if number == sizes.warm_up and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times.append(one(lambda number=number: step(number), device))  # type: ignore[misc]
    seconds = statistics.median(times[sizes.warm_up :])
    operations = shape.flops(lengths)
    result: dict[str, Any] = {
        "milliseconds": 1e3 * seconds,
        "tokens_per_second": sum(lengths) / seconds,
        "tflops": operations / seconds / 1e12,
        "mfu_of_measured_bf16": operations / seconds / 1e12 / peak_tflops if peak_tflops else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "padded_to_multiple_of": token_multiple(recipe),
        "losses": losses,
    }
    if losses[-1] >= losses[0]:
        raise RuntimeError(f"nothing was learnt: the loss went from {losses[0]:.4f} to {losses[-1]:.4f}")
    if expected is not None:
        apart = [found - right for found, right in zip(losses, expected, strict=True)]
        result["loss_difference"] = {
            "largest": max(map(abs, apart)),
            "mean": statistics.fmean(apart),
            "last_five": statistics.fmean(apart[-5:]),
        }
    return result, stack


def packed_part(sizes: Sizes, params: str, weights: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Sequences of uneven lengths, packed and padded: the same loss and gradient, then real tokens per second."""
    device, shape = platform.device(), sizes.shape
    lengths = uneven_lengths(sizes.sequences, sizes.length)
    batch = batch_of(lengths, shape.vocabulary, seed=BATCHES)
    forms = {"packed": batch, "padded": padded(batch)}
    seen = {}
    for name, form in forms.items():
        stack = Stack(shape, params, weights=weights)
        weights = stack.weights
        seen[name] = stack.step(form)
    (loss, norm), (padded_loss, padded_norm) = seen["packed"], seen["padded"]
    apart = {"loss": abs(loss - padded_loss) / abs(padded_loss), "grad_norm": abs(norm - padded_norm) / padded_norm}
    if not (apart["loss"] <= LOSS_TOLERANCE[params] and apart["grad_norm"] <= NORM_TOLERANCE[params]):
        raise RuntimeError(f"packed and padded differ: {apart}")
    stack = Stack(shape, params, weights=weights)
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(sizes.warm_up + sizes.repeats):
        for name, form in forms.items():  # turn and turn about
            spent = one(lambda form=form: stack.step(form), device)  # type: ignore[misc]
            if number >= sizes.warm_up:
                times[name].append(spent)
    result: dict[str, Any] = {"lengths": lengths, "relative_difference": apart}
    for name, form in forms.items():
        seconds = statistics.median(times[name])
        result[name] = {
            "positions": form.token_ids.numel(),
            "milliseconds": 1e3 * seconds,
            "real_tokens_per_second": sum(lengths) / seconds,
        }
    result["speedup"] = result["padded"]["milliseconds"] / result["packed"]["milliseconds"]
    return result
