"""Supervised cold start: `copd sft configs/mini/base.yaml` makes a base that is able in part.

The same policy, packing and optimizer as in reinforcement learning, with cross-entropy on demonstrations in the place
of rewards. Every update takes as many examples of each capability. Data-parallel ranks take disjoint slices of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copd_megatron.data.mini import MiniTask
from copd_megatron.data.settings import SourceSettings
from copd_megatron.errors import CopdError, DataError
from copd_megatron.policy.optimizer import OptimizerSettings


class Demonstrations(BaseModel):
    """Demonstrations of one capability: a modality of the mini suite, or a file with a `response` field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name of the capability."""
    mini: Literal["text", "image"] | None = None
    """Modality of the mini suite's cold-start split."""
    source: SourceSettings | None = None
    """Files or a data set of one's own."""


class SftSettings(BaseModel):
    """A supervised run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Hugging Face folder to start from."""
    out: str
    """Hugging Face folder to write."""
    data: tuple[Demonstrations, ...] = Field(min_length=1)
    """What is learned, one entry per capability."""
    mini: MiniTask = MiniTask()
    """Difficulty and conventions of the mini suite."""
    seed: int = 0
    """Seed of the order of examples."""
    steps: int = Field(300, ge=1)
    """Updates."""
    batch: int = Field(48, ge=1)
    """Examples of each capability in an update, over all data-parallel ranks."""
    world: int = Field(1, ge=1)
    """Data-parallel processes."""
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, warmup_steps=50)
    """AdamW; the learning rate falls linearly over all steps unless `decay_steps` says otherwise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and activations."""
    max_tokens_per_microbatch: int = Field(16_384, ge=1)
    """Packed tokens that go through the policy at once."""
    max_prompt_tokens: int = Field(16_384, ge=1)
    """Longer prompts are an error."""


def launch(settings: SftSettings) -> None:
    """Run `settings`, in a gang of processes of its own if `world` > 1. Raises CopdError if it fails."""
    if settings.world == 1 or "TORCHELASTIC_RUN_ID" in os.environ:
        run(settings)
        return
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings.model_dump(mode="json"), file)
        file.flush()
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(settings.world), "--rdzv-backend", "c10d",
                   "--rdzv-endpoint", "127.0.0.1:0", "-m", "copd_megatron.cli", "sft", file.name]  # fmt: skip
        environment = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **os.environ}
        status = subprocess.run([sys.executable, *command], env=environment).returncode
    if status:
        raise CopdError(f"the supervised run failed with status {status}; the reason stands above")


def run(settings: SftSettings) -> None:
    """This process's part of a supervised run."""
    import torch

    from copd_megatron.objectives.supervised import supervised_loss
    from copd_megatron.policy import layout
    from copd_megatron.policy.trainer import Policy
    from copd_megatron.weights.hf import write_folder

    torch.set_num_threads(1)
    degrees = layout.Layout(world=settings.world)
    layout.initialize(degrees, settings.seed)
    optimizer = settings.optimizer
    if optimizer.decay_steps is None:
        optimizer = optimizer.model_copy(update={"decay_steps": settings.steps})
    policy = Policy(settings.model, degrees, optimizer, settings.precision, settings.max_tokens_per_microbatch)
    batches = _Batches(settings, layout.data_parallel_rank(), layout.data_parallel_size())
    leader = torch.distributed.get_rank() == 0
    columns = (TextColumn("cold start"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
    began = time.perf_counter()
    with Progress(*columns, TimeRemainingColumn(), console=Console(), disable=not leader) as progress:
        task = progress.add_task("", total=settings.steps, loss="")
        for _ in range(settings.steps):
            metrics = policy.update(
                batches.next(), lambda logits, targets, signals: supervised_loss(logits, targets, signals.weight)
            )
            progress.update(task, advance=1, loss=f"loss {metrics['sft/loss']:.3f}")
    weights = policy.named_weights()
    if leader:
        write_folder(Path(settings.out), weights, like=Path(settings.model), overwrite=True)
        Console().print(f"{settings.out}: {settings.steps} updates in {time.perf_counter() - began:.0f} s")
    layout.shutdown()


class _Batches:
    """This rank's slices of the batches, in an order that depends on the seed alone."""

    def __init__(self, settings: SftSettings, rank: int, replicas: int) -> None:
        from copd_megatron.data.prompts import PromptBuilder, load_processor
        from copd_megatron.data.sampler import Sampler

        if settings.batch % replicas:
            raise CopdError(f"batch = {settings.batch} is not a multiple of world = {replicas}")
        self._builder = PromptBuilder(load_processor(settings.model), settings.max_prompt_tokens)
        self._share = settings.batch // replicas
        self._sources = {entry.name: _open(entry, settings) for entry in settings.data}
        self._samplers = {
            name: Sampler(len(source), settings.seed, f"sft/{name}", rank, replicas)
            for name, source in self._sources.items()
        }

    def next(self) -> Sequence[object]:
        """Samples of the next update."""
        import torch

        from copd_megatron.policy.batching import Sample
        from copd_megatron.rollout.types import Rollout

        samples = []
        for name, source in self._sources.items():
            examples = [source[index] for index in self._samplers[name].draw(self._share)]
            prompts, refused = self._builder.build_many(examples, name)
            if refused:
                raise DataError(f"{refused[0].uid}: {refused[0].reason}")
            for example, prompt in zip(examples, prompts, strict=True):
                if example.response is None:
                    raise DataError(f"{example.uid}: no response to learn from; map one in `fields.response`")
                tokens = self._builder.response_token_ids(example.response)
                samples.append(Sample(Rollout(prompt, tokens, torch.zeros(len(tokens)), "stop", 0, example.response)))
        return samples


def _open(entry: Demonstrations, settings: SftSettings):  # type: ignore[no-untyped-def]
    from copd_megatron.data.mini import MiniSource
    from copd_megatron.data.sources import open_source

    if entry.mini is not None:
        size = settings.steps * settings.batch
        return MiniSource(settings.mini, entry.mini, "cold_start", settings.seed, size)
    if entry.source is None:
        raise DataError(f"data.{entry.name}: give `mini` or `source`")
    return open_source(entry.source)
