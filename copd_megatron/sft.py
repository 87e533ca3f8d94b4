"""Supervised cold start: `copd sft configs/mini/base.yaml` makes a base that is able in part.

The same policy, packing and optimizer as in reinforcement learning, with cross-entropy on demonstrations in the place
of rewards. Every update takes as many examples of each capability.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from copd_megatron.data.mini import MiniTask
from copd_megatron.data.mini.task import Modality
from copd_megatron.data.settings import SourceSettings
from copd_megatron.errors import CopdError
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.supervision.processes import Processes, seats
from copd_megatron.supervision.run_lock import die_with_parent

if TYPE_CHECKING:
    from copd_megatron.data.capability import Source

_POLL_SECONDS = 0.25


class Demonstrations(BaseModel):
    """Demonstrations of one capability: a modality of the mini suite, or a data set with a `response` field."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name of the capability."""
    mini: Modality | None = None
    """Modality of the mini suite's cold-start split."""
    source: SourceSettings | None = None
    """Files or a data set of one's own."""

    @model_validator(mode="after")
    def _one_origin(self) -> Demonstrations:
        if (self.mini is None) == (self.source is None):
            raise ValueError("give either `mini` or `source`, not both and not neither")
        return self


class SftSettings(BaseModel):
    """A supervised run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str
    """Hugging Face folder to start from."""
    out: str
    """Hugging Face folder to write; a model that is already there is replaced when the new one is complete."""
    data: tuple[Demonstrations, ...] = Field(min_length=1)
    """What is learned, one entry per capability."""
    metrics: str | None = None
    """File of metrics, one JSON object per update. Default: `out` with `.metrics.jsonl` appended."""
    mini: MiniTask = MiniTask()
    """Difficulty and conventions of the mini suite."""
    seed: int = 0
    """Seed of the order of examples, and of the mini suite's examples."""
    steps: int = Field(300, ge=1)
    """Updates."""
    batch: int = Field(48, ge=1)
    """Examples of each capability in an update, over all data-parallel ranks."""
    world: int = Field(1, ge=1)
    """Data-parallel processes; a divisor of `batch`."""
    optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3, warmup_steps=50)
    """AdamW; the learning rate falls linearly over all updates unless `decay_steps` says otherwise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and activations."""
    max_tokens_per_microbatch: int = Field(16_384, ge=1)
    """Packed tokens that go through the policy at once."""
    max_prompt_tokens: int = Field(8192, ge=1)
    """Longer prompts, image tokens included, are refused."""

    @model_validator(mode="after")
    def _consistent(self) -> SftSettings:
        names = [entry.name for entry in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data: names must differ, found {names}")
        if self.batch % self.world:
            raise ValueError(f"batch = {self.batch} cannot be shared out evenly among world = {self.world} processes")
        return self


def launch(settings: SftSettings) -> None:
    """Run `settings`, in a gang of processes of its own if `world` > 1. Raises CopdError if it fails."""
    if settings.world == 1 or "RANK" in os.environ:
        run(settings)
        return
    from copd_megatron.exchange import address, serve

    store = serve()
    meeting = address(store.host, store.port)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(settings.model_dump(mode="json"), file)
        file.flush()
        command = [sys.executable, "-m", "copd_megatron.cli", "sft", file.name]
        environments = [{**os.environ, **meeting, **seat} for seat in seats(settings.world)]
        ranks = Processes(command, environments, before=die_with_parent)
        try:
            while (status := ranks.poll()) is None:
                time.sleep(_POLL_SECONDS)
        finally:
            ranks.kill()
    if status:
        raise CopdError(f"the supervised run failed with status {status}; the reason stands above")


def run(settings: SftSettings) -> None:
    """This process's part of a supervised run. Raises CopdError where model, data or output cannot be used."""
    import torch

    from copd_megatron.data.prompts import PromptBuilder, load_processor
    from copd_megatron.demonstrations import DemonstrationBatches
    from copd_megatron.objectives.supervised import supervised_loss
    from copd_megatron.observe.metrics import MetricsWriter
    from copd_megatron.policy import layout
    from copd_megatron.policy.trainer import Policy
    from copd_megatron.weights.hf import write_folder

    began = time.perf_counter()
    degrees = layout.Layout(world=settings.world)
    layout.initialize(degrees, settings.seed)
    try:
        builder = PromptBuilder(load_processor(settings.model), settings.max_prompt_tokens)
        sources = {entry.name: _open(entry, settings) for entry in settings.data}
        batches = DemonstrationBatches(
            sources, builder, settings.batch, settings.seed, layout.data_parallel_rank(), layout.data_parallel_size()
        )
        policy = Policy(
            settings.model, degrees, _schedule(settings), settings.precision, settings.max_tokens_per_microbatch
        )
        leader = torch.distributed.get_rank() == 0
        writer = MetricsWriter(_fresh(settings.metrics or f"{settings.out}.metrics.jsonl"), "sft") if leader else None
        columns = (TextColumn("cold start"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"))
        with Progress(*columns, TimeRemainingColumn(), console=Console(), disable=not leader) as progress:
            task = progress.add_task("", total=settings.steps, loss="")
            for _ in range(settings.steps):
                started = time.perf_counter()
                metrics = policy.update(batches.draw(), supervised_loss)
                metrics["tokens_per_second"] = metrics["tokens"] / (time.perf_counter() - started)
                progress.update(task, advance=1, loss=f"loss {metrics['sft/loss']:.3f}")
                if writer is not None:
                    writer.write(policy.version, 0, "sft", **metrics)
        weights = policy.named_weights()
        if writer is not None:
            writer.close()
            write_folder(settings.out, weights, like=settings.model, overwrite=True)
            Console().print(f"{settings.out}: {settings.steps} updates in {time.perf_counter() - began:.0f} s")
        else:
            for _ in weights:  # every rank takes part in gathering
                pass
    finally:
        layout.shutdown()


def _schedule(settings: SftSettings) -> OptimizerSettings:
    if settings.optimizer.decay_steps is not None:
        return settings.optimizer
    return settings.optimizer.model_copy(update={"decay_steps": settings.steps})


def _open(entry: Demonstrations, settings: SftSettings) -> Source:
    from copd_megatron.data.mini import MiniSource
    from copd_megatron.data.sources import open_source

    if entry.mini is not None:
        size = settings.steps * settings.batch  # no example is seen twice
        return MiniSource(settings.mini, entry.mini, "cold_start", settings.seed, size)
    assert entry.source is not None  # Demonstrations checks it
    return open_source(entry.source)


def _fresh(path: str) -> Path:
    """`path` without what an earlier run has left there."""
    Path(path).unlink(missing_ok=True)
    return Path(path)
