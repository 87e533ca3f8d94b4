"""The trainable side of a branch: one Megatron model, its optimizer, and an update from samples."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from copd_megatron.errors import DataError, TrainingDiverged
from copd_megatron.policy import platform
from copd_megatron.policy.balance import Cost, rebalance
from copd_megatron.policy.batching import NATIVE, Packed, Sample, by_prompt, pack
from copd_megatron.policy.fp8 import NO_FP8, Fp8Choice
from copd_megatron.policy.layout import Layout, data_parallel_rank, data_parallel_size
from copd_megatron.policy.optimizer import OptimizerSettings, learning_rate
from copd_megatron.policy.packed import MicroBatch
from copd_megatron.policy.schedule import (
    Loss,
    Measure,
    computed_positions,
    logprob_pass,
    measure_pass,
    over_replicas,
    sum_gradients,
    train_pass,
)
from copd_megatron.rollout.positions import MediaTokens, prompt_positions, text_positions
from copd_megatron.rollout.types import Prompt
from copd_megatron.weights.hf import HfFolder

platform.prepare()

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.optimizer import clip_grad_by_total_norm_fp32  # noqa: E402

from copd_megatron.policy.qwen3_vl import Qwen3VLModel, build_model  # noqa: E402
from copd_megatron.policy.qwen3_vl.config import Precision, Recompute, torch_dtype  # noqa: E402
from copd_megatron.weights import mapping  # noqa: E402

logger = logging.getLogger(__name__)

LISTED = 3
"""Parameters with bad gradients that a message spells out."""


class Policy:
    """A branch's model on this gang of processes. All methods are collective: every rank of the gang calls them.

    The ranks of one replica (tensor and pipeline parallel) pass the same samples, replicas pass their own. `version`
    counts updates, skipped ones too, so that branches that move in lockstep stay there.
    """

    def __init__(
        self,
        base: str | os.PathLike[str],
        layout: Layout,
        optimizer: OptimizerSettings,
        precision: Precision,
        max_tokens_per_microbatch: int,
        recompute: Recompute = "none",
        fp8: Fp8Choice = NO_FP8,
    ) -> None:
        """Build the model of the Hugging Face folder `base` and load its weights.

        `layout.initialize` must have been called. Raises WeightsError for a folder that cannot be used, ConfigError for
        a layout that does not fit the model.
        """
        self.settings = optimizer
        self.version = 0
        self.skipped_in_a_row = 0
        self._max_tokens = max_tokens_per_microbatch
        model = build_model(base, layout, precision, recompute, fp8)
        mapping.to_megatron(dict(HfFolder(base).tensors()), model)
        self.hf_config = model[0].settings.hf
        self._cost = Cost.of(model[0].settings)
        self._media_tokens = MediaTokens.of(self.hf_config)
        self.chunks = _wrapped(model, optimizer)
        self.optimizer = _megatron_optimizer(optimizer, precision, self.chunks)

    @property
    def model(self) -> DistributedDataParallel:
        """The first chunk, which is the only one without virtual pipeline stages."""
        return self.chunks[0]

    def update(
        self,
        samples: Sequence[Sample],
        loss: Loss,
        sequences: Mapping[int, int] | None = None,
        old_logprobs: Sequence[torch.Tensor] | None = None,
        teach: Callable[[Sequence[MicroBatch]], list[MicroBatch]] | None = None,
    ) -> dict[str, float]:
        """One optimizer step on `samples`; `version` then is one higher.

        `sequences` is the number of sequences per source, over all replicas, that the mean is taken over; it may count
        some that are not among `samples` because they have no gradient. Default: those in `samples`. A replica may
        have no samples at all. `old_logprobs` are those of `logprobs` before the first of several updates on the same
        samples. Where teachers are resident, `teach` gives the micro-batches their lessons, and samples need no scores.

        Samples move between replicas so that all have about the same to compute. The gradient is that of the sum of
        `loss` over all micro-batches of all replicas, however they are divided. If that sum or the gradient's norm is
        not finite, weights and optimizer state stay as they are, and the update still counts.

        Returns the mean of each statistic of `loss` (left out where its count is 0) and `loss`, `grad_norm` (before
        clipping), `lr`, `skipped` (0 or 1), `tokens` (computed, all replicas), `tokens_saved` (by sharing prompts),
        `useful_share` (of the computed positions that hold a token), `response_tokens`, `microbatches` (of this
        replica).

        Raises TrainingDiverged when `max_skipped` updates in a row had to be skipped.
        """
        counts = self._counts(samples, sequences)
        samples, old_logprobs = self._balanced(samples, old_logprobs, taught=teach is not None)
        packed = self._pack(samples, counts, old_logprobs, by_source=teach is not None)
        if teach is not None:
            packed = replace(packed, microbatches=teach(packed.microbatches))
        rate = self._set_learning_rate()
        self._zero_gradients()
        total_loss, totals = train_pass(self.chunks, packed.microbatches, loss)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        self.version += 1
        finite = math.isfinite(total_loss) and math.isfinite(grad_norm)
        if finite:
            self.skipped_in_a_row = 0
            self._step(grad_norm)
        else:
            self._skip(total_loss, grad_norm, totals)
        return {
            **_means(totals),
            "loss": total_loss,
            "grad_norm": grad_norm,
            "lr": rate,
            "skipped": float(not finite),
            **_sizes(packed, computed_positions(self.chunks, packed.microbatches)),
        }

    def measure(self, samples: Sequence[Sample], measure: Measure) -> dict[str, float]:
        """Means of the statistics that `measure` gives, from a forward pass alone; those with count 0 are left out."""
        packed = self._pack(samples, self._counts(samples))
        return _means(measure_pass(self.chunks, packed.microbatches, measure))

    def logprobs(self, samples: Sequence[Sample], temperature: float = 1.0) -> list[torch.Tensor]:
        """Log-probabilities float32 [R_i] of each sample's response under the current weights, on the CPU.

        Collective over the replica; with expert parallelism, over the gang.
        """
        packed = self._pack(samples, Counter(sample.source for sample in samples))
        result: list[torch.Tensor] = [torch.empty(0)] * len(samples)
        passed = logprob_pass(self.chunks, packed.microbatches, temperature)
        for members, logprobs in zip(packed.order, passed, strict=True):
            lengths = [len(samples[index].rollout.token_ids) for index in members]
            for index, part in zip(members, logprobs.split(lengths), strict=True):
                result[index] = part
        return result

    def named_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, tensor) of every weight, on each replica's leader.

        Collective over the gang: every process must iterate to the end; those that are no leaders get nothing.
        Tensors may be views of the live parameters: copy what must outlast the next update.
        """
        if self.settings.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        return mapping.to_hf(self.chunks)

    def load_hf(self, folder: str | os.PathLike[str]) -> None:
        """Take the weights of a Hugging Face folder of the same model. Optimizer state and `version` stay."""
        mapping.to_megatron(dict(HfFolder(folder).tensors()), self.chunks)
        self.optimizer.reload_model_params()

    def positions(self, prompt: Prompt) -> torch.Tensor:
        """Position ids int64 [3, S] of a prompt's tokens. DataError for media where the model takes text alone, or
        where they do not fit the tokens."""
        if self._media_tokens is None:
            if prompt.media is not None:
                raise DataError(
                    f"prompt {prompt.uid}: has images or videos, but a {self.hf_config.model_type!r} takes text alone; "
                    "give it data without them, or choose a base that sees"
                )
            return text_positions(len(prompt.token_ids))
        try:
            return prompt_positions(prompt.token_ids, prompt.media, self._media_tokens)
        except DataError as error:
            raise DataError(f"prompt {prompt.uid}: {error}") from error

    def _counts(self, samples: Sequence[Sample], sequences: Mapping[int, int] | None = None) -> Mapping[int, int]:
        """Sequences per source, over all replicas."""
        if sequences is not None:
            return sequences
        counts: Counter[int] = Counter()
        for part in over_replicas(Counter(sample.source for sample in samples)):
            counts.update(part)
        return counts

    def _balanced(
        self, samples: Sequence[Sample], old_logprobs: Sequence[torch.Tensor] | None, taught: bool
    ) -> tuple[Sequence[Sample], Sequence[torch.Tensor] | None]:
        """This replica's share of all replicas' samples, by what they cost; a prompt's samples stay together."""
        if data_parallel_size() == 1:
            return samples, old_logprobs
        groups = [
            [(samples[index], None if old_logprobs is None else old_logprobs[index]) for index in members]
            for members in by_prompt(samples)
        ]
        costs = [
            self._cost.group(group[0][0].rollout.prompt, [len(sample.rollout.token_ids) for sample, _ in group])
            # A resident teacher's forward pass is a third of the student's forward and backward.
            * (4 / 3 if taught and group[0][0].source != NATIVE else 1)
            for group in groups
        ]
        mine = [pair for group in rebalance(groups, costs, data_parallel_rank(), over_replicas) for pair in group]
        old = None if old_logprobs is None else [logprobs for _, logprobs in mine if logprobs is not None]
        return [sample for sample, _ in mine], old

    def _pack(
        self,
        samples: Sequence[Sample],
        counts: Mapping[int, int],
        old_logprobs: Sequence[torch.Tensor] | None = None,
        by_source: bool = False,
    ) -> Packed:
        ids = () if self._media_tokens is None else (self._media_tokens.image, self._media_tokens.video)
        return pack(samples, self._max_tokens, counts, self.positions, ids, old_logprobs, by_source)

    def _set_learning_rate(self) -> float:
        rate = learning_rate(self.settings, self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _step(self, grad_norm: float) -> None:
        if self.settings.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), self.settings.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()

    def _skip(self, total_loss: float, grad_norm: float, totals: dict[str, tuple[float, float]]) -> None:
        reason = self._what_is_bad(total_loss, grad_norm, totals)
        self._zero_gradients()
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.settings.max_skipped:
            raise TrainingDiverged(
                f"update {self.version} had to be skipped, number {self.skipped_in_a_row} in a row: {reason}. The "
                f"weights are those after update {self.version - self.skipped_in_a_row}. Go on from an earlier "
                "checkpoint with a lower optimizer.lr, or look at the samples of these updates"
            )
        logger.warning("update %d is skipped: %s", self.version, reason)

    def _what_is_bad(self, total_loss: float, grad_norm: float, totals: dict[str, tuple[float, float]]) -> str:
        """The values that are not finite; parameters are those of this rank."""
        parameters = {name: value for chunk in self.chunks for name, value in chunk.module.named_parameters()}
        bad = [name for name, value in parameters.items() if not torch.isfinite(value.main_grad).all()]
        statistics = [name for name, (value, _) in totals.items() if not math.isfinite(value)]
        parts = [f"the loss is {total_loss}", f"the gradient's norm is {grad_norm}"]
        if statistics:
            parts.append(f"not finite are the statistics {', '.join(statistics)}")
        if bad:
            more = ", …" if len(bad) > LISTED else ""
            parts.append(f"{len(bad)} of {len(parameters)} gradients are not finite ({', '.join(bad[:LISTED])}{more})")
        return "; ".join(parts)


def _wrapped(model: Sequence[Qwen3VLModel], settings: OptimizerSettings) -> list[DistributedDataParallel]:
    """The chunks with their gradient buffers, and in their config what the schedule does with them."""
    reduction = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
    )
    chunks = []
    for number, chunk in enumerate(model):
        sum_gradients(chunk.config)
        # A reduction that starts during the backward pass waits for every parameter's gradient.
        chunk.touch_all = settings.overlap_grad_reduce
        chunks.append(DistributedDataParallel(chunk.config, reduction, chunk, disable_bucketing=number > 0))
    if settings.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        for chunk in chunks:
            chunk.config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    return chunks


def _megatron_optimizer(
    settings: OptimizerSettings, precision: Precision, model: list[DistributedDataParallel]
) -> ChainedOptimizer:
    """AdamW over megatron-core's default parameter groups: all with weight decay but what has one dimension."""
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=precision == "bf16",
        params_dtype=torch_dtype(precision),
        use_distributed_optimizer=settings.distributed,
        overlap_param_gather=settings.overlap_param_gather,
        optimizer_cpu_offload=settings.offload and platform.on_gpu(),
    )
    optimizer = get_megatron_optimizer(config, model)
    for group in optimizer.param_groups:
        # Applying a group's multiplier is the task of megatron-core's scheduler, whose place `learning_rate` takes.
        group["weight_decay"] = settings.weight_decay * group["wd_mult"]
        if "fused" in group:  # torch's AdamW; left to itself it goes through the parameters in a Python loop
            group["fused"] = True
    return optimizer


def _means(totals: dict[str, tuple[float, float]]) -> dict[str, float]:
    return {name: value / count for name, (value, count) in totals.items() if count}


def _sizes(packed: Packed, positions: int) -> dict[str, float]:
    responses = sum(len(batch.targets) for batch in packed.microbatches)
    parts = over_replicas((packed.tokens, packed.unshared_tokens - packed.tokens, positions, responses))
    tokens, saved, computed, response_tokens = (float(sum(column)) for column in zip(*parts, strict=True))
    return {
        "tokens": tokens,
        "tokens_saved": saved,
        "useful_share": tokens / computed,
        "response_tokens": response_tokens,
        "microbatches": float(len(packed.microbatches)),
    }
