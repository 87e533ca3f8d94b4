"""The algorithm's settings. Defaults are the paper's where it gives them, else our choice (docs/method.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from copd_megatron.config.section import Section
from copd_megatron.errors import ConfigError
from copd_megatron.objectives.settings import OpdLoss
from copd_megatron.policy.fp8 import Fp8, Fp8Choice
from copd_megatron.weights.merge.recipe import MethodName, Recipe


class CorrectionConfig(Section):
    """What is done about engine and trainer disagreeing on the log-probability of the same token."""

    importance_cap: float | None = Field(2.0, gt=0)
    """Truncated importance sampling: weight min(exp(trainer − engine), cap). None: off."""
    mask: tuple[float, float] | None = None
    """Two-sided mask: tokens whose ratio lies outside are left out of the loss, e.g. [0.5, 2.0]. None: off."""


class RLConfig(Section):
    """GRPO on a branch's own capability."""

    prompts: int = Field(256, ge=1)
    """Prompts of a Phase I step, over all data-parallel ranks."""
    group: int = Field(8, ge=2)
    """Rollouts per prompt (G)."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    """Lower clip range of the ratio (ε_low)."""
    clip_high: float = Field(0.28, gt=0)
    """Upper clip range of the ratio (ε_high)."""
    normalise_std: bool = True
    """Divide the group advantage by the group's standard deviation."""
    correction: CorrectionConfig = CorrectionConfig()
    """Engine against trainer log-probabilities."""


class OPDConfig(Section):
    """Mutual on-policy distillation, the second half of every Phase II update."""

    loss: OpdLoss = "sampled"
    """`sampled` (the paper): policy gradient on β(log π_teacher − log π_student) of the sampled token;
    `topk_reverse`, `topk_forward`, `jsd`: a divergence on the teacher's top-k and a tail bucket, as a loss;
    `full_reverse`, `full_forward`, `full_jsd`: over the whole vocabulary (teacher.where = resident)."""
    jsd_beta: float = Field(0.5, ge=0, le=1)
    """Mixture of `jsd` and `full_jsd`: 0 is forward KL, 1 is reverse KL."""
    beta: float = Field(1.0, gt=0)
    """Weight of the teacher's term (β)."""
    top_k: int = Field(64, ge=1)
    """Entries of the teacher's distribution per token; the whole vocabulary where that is smaller."""
    delta_clip: float = Field(5.0, gt=0)
    """Bound of the sampled token's log-ratio δ."""
    native_prompts: int | None = Field(None, ge=0)
    """Own prompts in a Phase II step; default `rl.prompts`, and none under `static_opd` and `mopd`."""
    cross_prompts: int | None = Field(None, ge=1)
    """Prompts of the teachers' capabilities in a Phase II step, dealt out evenly among a student's teachers; default
    `rl.prompts`."""


class TeacherConfig(Section):
    """Where the teachers are, and how current."""

    where: Literal["engine", "resident"] = "engine"
    """`engine`: the peer's rollout engine scores the student's rollouts; `resident`: the student's trainer does, with a
    second model that holds the peer's published weights (docs/method.md, "Resident teachers")."""
    refresh: Literal["step", "phase"] = "step"
    """`step`: the teacher has made exactly as many updates as the student; `phase`: it stays as it was when
    Phase II began."""
    wait_seconds: float = Field(600.0, gt=0)
    """How long a branch waits for a peer before it stops."""


class PrecisionConfig(Section):
    """Number formats of the policy, and what it keeps in memory."""

    params: Literal["fp32", "bf16"] = "bf16"
    """Format of weights and activations; master weights and gradients are fp32 either way."""
    fp8: Fp8 = "none"
    """FP8 products in the language model's layers (NVIDIA GPUs with Transformer Engine; `copd doctor` says which can be
    used): `tensorwise` and `delayed` scale whole tensors, by their present or their earlier largest values, `blockwise`
    blocks of 128."""
    fp8_bf16_layers_at_start: int | None = Field(None, ge=0)
    """First layers that stay in bf16. None: 1; with `delayed`, which has every layer in FP8, 0."""
    fp8_bf16_layers_at_end: int | None = Field(None, ge=0)
    """Last layers that stay in bf16. None: as at the start."""
    max_tokens_per_microbatch: int = Field(32_768, ge=1)
    """Packed tokens that go through the policy at once."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, attention, or whole layers."""

    @model_validator(mode="after")
    def _fp8_fits(self) -> PrecisionConfig:
        if self.fp8 != "none" and self.params != "bf16":
            raise ValueError(f"fp8 = {self.fp8} needs params = bf16, found {self.params}")
        if self.fp8 == "delayed" and (self.fp8_bf16_layers_at_start or self.fp8_bf16_layers_at_end):
            raise ValueError(
                "fp8 = delayed has every layer in FP8; leave fp8_bf16_layers_at_start and fp8_bf16_layers_at_end out, "
                "or choose fp8 = tensorwise"
            )
        return self

    def fp8_choice(self) -> Fp8Choice:
        """The FP8 settings as the policy takes them."""
        return Fp8Choice(self.fp8, self.fp8_bf16_layers_at_start, self.fp8_bf16_layers_at_end)


class MergeConfig(Section):
    """The one model at the end."""

    method: MethodName = "linear"
    """`linear`: weighted average of the parameters (the paper: uniform). The others are described in docs/weights.md:
    `slerp`, `task`, `ties`, `dare_linear`, `dare_ties`, `multislerp`, `karcher`."""
    weights: dict[str, float] | None = None
    """Weight per branch; equal where absent."""
    tensor_weights: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Weight per branch for the tensors whose Hugging Face name matches a pattern, e.g.
    {"model.visual.*": {text: 0, image: 1}}; of several patterns the last that matches."""
    normalise: bool | None = None
    """Divide by the sum of the weights; where absent, `linear` and `ties` do, `task` and `dare_*` do not."""
    density: float | None = None
    """Share of each branch's changes that `ties` and `dare_*` keep, more than 0 and at most 1; 0.5 where absent."""
    scale: float | None = None
    """Factor of the merged changes (`task`, `ties`, `dare_*`); 1 where absent."""

    def recipe(self, names: Sequence[str], seed: int) -> Recipe:
        """For the branches called `names`, in their order. Raises ConfigError if it does not fit them."""
        recipe = Recipe(
            method=self.method,
            weights=None if self.weights is None else self._in_order("merge.weights", self.weights, names),
            tensor_weights=tuple(
                (pattern, self._in_order(f"merge.tensor_weights[{pattern!r}]", weights, names))
                for pattern, weights in self.tensor_weights.items()
            ),
            normalise=self.normalise,
            density=self.density,
            scale=self.scale,
            seed=seed,
        )
        recipe.check_inputs(len(names))
        return recipe

    @staticmethod
    def _in_order(key: str, weights: dict[str, float], names: Sequence[str]) -> tuple[float, ...]:
        if set(weights) != set(names):
            raise ConfigError(f"{key}: expected one weight for each of {list(names)}, found {sorted(weights)}")
        return tuple(weights[name] for name in names)


class CheckpointConfig(Section):
    """When a run can be continued from."""

    every_steps: int | None = Field(None, ge=1)
    """Also save every so many updates; the end of each phase is always saved."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    keep_every_steps: int | None = Field(None, ge=1)
    """Checkpoints at multiples of this many updates are kept too, for good."""
    at_steps: tuple[int, ...] = ()
    """Checkpoints after these updates are made and kept too, for good."""
    asynchronous: bool = True
    """Train on while a checkpoint is written; needs host memory for a copy of what each rank writes."""

    def is_due(self, step: int) -> bool:
        """Whether there is to be a checkpoint after update `step`, whatever phase it is in."""
        return step in self.at_steps or (self.every_steps is not None and step % self.every_steps == 0)

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of `step` is kept for good."""
        return step in self.at_steps or (self.keep_every_steps is not None and step % self.keep_every_steps == 0)


class EvalConfig(Section):
    """The table at the end of a run."""

    problems: int = Field(1024, ge=1)
    """Problems per capability, or per benchmark where a branch has `data.benchmarks`; the first so many."""
    split: Literal["test", "validation"] = "test"
    """Which problems: `validation` is for choosing settings, so that the test problems are not used up by it."""
    samples: int = Field(1, ge=1)
    """Samples per problem; 1 is greedy. Benchmarks may have `samples` of their own."""
    models: tuple[Literal["base", "branches", "merged"], ...] = ("base", "branches", "merged")
    """Which models are evaluated."""


class LogConfig(Section):
    """What is measured along the way."""

    overlap_k: int = Field(10, ge=1)
    """k of overlap@k."""
    probe_every: int = Field(5, ge=1)
    """Updates between two measurements of drift between the branches; phase ends are always measured."""
    probe_prompts: int = Field(64, ge=1)
    """Validation prompts per capability in such a measurement."""
    kl_to_base: bool = True
    """Measure KL(π_0 ‖ π_k) too; it takes a second engine with the base's weights."""
    tensorboard: bool = True
    """Write TensorBoard event files too."""
