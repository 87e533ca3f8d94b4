"""Settings of the optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, model_validator


class OptimizerSettings(BaseModel):
    """AdamW. The learning rate is the paper's; the rest is our choice (docs/method.md, "Paper's settings")."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    lr: float = Field(1e-6, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's ε."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay of matrices. Biases, norm weights and everything else with one dimension have none, which
    is megatron-core's default."""
    clip_grad: float = Field(1.0, ge=0)
    """Largest gradient norm, over all parameters; 0 is off."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly from lr / warmup_steps to lr."""
    decay_steps: int | None = Field(None, ge=1)
    """Updates over which the learning rate falls linearly to lr × min_lr_ratio, counted from the first one; it stays
    there afterwards. None: constant."""
    min_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Where the decay ends, as a share of lr."""
    distributed: bool = False
    """Shard the optimizer's state over the data-parallel ranks (megatron-core's distributed optimizer)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights while the next forward pass runs; needs `distributed` and `overlap_grad_reduce`. It helps
    where several updates follow each other without new rollouts: handing weights to an engine gathers them all."""
    offload: bool = False
    """Keep optimizer state, and compute updates, in host memory. Without a GPU they are there anyway."""
    max_skipped: int = Field(5, ge=1)
    """The run stops when this many updates in a row had to be skipped, because loss or gradient was not finite."""

    @model_validator(mode="after")
    def _gather_needs_shards(self) -> OptimizerSettings:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed: true and overlap_grad_reduce: true")
        return self

    @model_validator(mode="after")
    def _betas_below_one(self) -> OptimizerSettings:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), found {self.betas}")
        return self


def learning_rate(settings: OptimizerSettings, step: int) -> float:
    """The learning rate of the update that has `step` updates before it: warm-up times decay."""
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.decay_steps is None:
        return settings.lr * warmup
    done = min(step, settings.decay_steps) / settings.decay_steps
    return settings.lr * warmup * (1.0 - (1.0 - settings.min_lr_ratio) * done)
