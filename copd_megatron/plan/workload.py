"""What one update of a branch consists of: rollouts of each capability, and their tokens, patches and pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from copd_megatron.config.branches import BranchConfig, BranchData
from copd_megatron.config.run import RunConfig
from copd_megatron.plan.assumptions import Assumptions
from copd_megatron.plan.geometry import Geometry
from copd_megatron.plan.lengths import Lengths
from copd_megatron.plan.packing import Packing, full

Modality = Literal["text", "image", "video"]

_PATCHES = 4
"""Patches of a merged one, in all families."""


@dataclass(frozen=True)
class Capability:
    """Prompts of one branch's data: mean tokens, of which `visual` stand for patches, in frames of `frame` of them."""

    name: str
    modality: Modality
    prompt: int
    visual: int
    frame: int


@dataclass(frozen=True)
class Portion:
    """`prompts` prompts of a capability with `group` responses each, over the whole gang."""

    capability: Capability
    prompts: int
    group: int
    lengths: Lengths

    @property
    def rollouts(self) -> int:
        """Responses."""
        return self.prompts * self.group

    @property
    def response_tokens(self) -> float:
        """Of all responses."""
        return self.rollouts * self.lengths.average

    @property
    def packed_tokens(self) -> float:
        """Tokens that the policy computes: each prompt once, each response without its last token."""
        return self.prompts * self.capability.prompt + self.response_tokens - self.rollouts

    @property
    def sequence_tokens(self) -> float:
        """Prompt and response of every rollout."""
        return self.rollouts * self.capability.prompt + self.response_tokens

    @property
    def patches(self) -> float:
        """Patches of all prompts, each prompt once."""
        return self.prompts * self.capability.visual * _PATCHES

    def pairs(self) -> float:
        """Pairs of tokens that attend to each other, prompts once."""
        prompt, response = self.capability.prompt, self.lengths
        behind = response.average * prompt + response.mean_square / 2
        return self.prompts * (prompt**2 / 2 + self.group * behind)

    def operations(self, geometry: Geometry) -> tuple[float, float]:
        """Of a forward pass: in matrix products, and in attention."""
        tower, frame = geometry.tower, self.capability.frame * _PATCHES
        products = geometry.cost_token * self.packed_tokens
        products += 2.0 * geometry.hidden * geometry.vocab * self.response_tokens
        attention = geometry.cost_pair * self.pairs()
        if tower is not None:
            products += tower.cost_patch * self.patches
            attention += tower.cost_pair * self.patches * frame
        return products, attention


@dataclass(frozen=True)
class Update:
    """One update of a branch: its own prompts and, in Phase II, those of each teacher."""

    native: Portion
    cross: dict[str, Portion]

    @property
    def portions(self) -> tuple[Portion, ...]:
        """All that has prompts."""
        return tuple(portion for portion in (self.native, *self.cross.values()) if portion.prompts)

    @property
    def rollouts(self) -> int:
        """Responses over the whole gang."""
        return sum(portion.rollouts for portion in self.portions)


def capability_of(branch: BranchConfig, config: RunConfig, assumed: Assumptions) -> Capability:
    """What a branch's prompts look like on average, by the kind of its data."""
    modality = _modality(branch.data)
    most = config.data.max_prompt_tokens
    prompt = min(most, getattr(assumed, f"{modality}_prompt_tokens"))
    visual = 0 if modality == "text" else int(prompt * assumed.visual_share)
    frame = min(visual, assumed.frame_tokens) if modality == "video" else visual
    return Capability(branch.name, modality, prompt, visual, max(1, frame))


def lengths_of(config: RunConfig, assumed: Assumptions) -> Lengths:
    """How long responses are."""
    longest = config.rollout.max_new_tokens
    return Lengths(min(assumed.response_tokens, longest), assumed.response_spread, longest)


def updates(config: RunConfig, name: str, assumed: Assumptions) -> dict[str, Update]:
    """An update of branch `name` in each phase, "explore" and "exchange"."""
    lengths = lengths_of(config, assumed)

    def portion(of: str, prompts: int) -> Portion:
        return Portion(capability_of(config.branch(of), config, assumed), prompts, config.rl.group, lengths)

    return {
        "explore": Update(portion(name, config.rl.prompts), {}),
        "exchange": Update(
            portion(name, config.native_prompts),
            {teacher: portion(teacher, prompts) for teacher, prompts in config.lessons(name).items()},
        ),
    }


def microbatches(update: Update, config: RunConfig, replicas: int) -> int:
    """Micro-batches of one replica: as few as hold its tokens."""
    tokens = sum(portion.packed_tokens for portion in update.portions) / replicas
    return max(1, math.ceil(tokens / config.precision.max_tokens_per_microbatch))


def packings(capability: Capability, config: RunConfig, assumed: Assumptions) -> dict[str, Packing]:
    """The micro-batches that memory has to do for: full of average rollouts, and one with the longest prompt."""
    budget, longest = config.precision.max_tokens_per_microbatch, config.data.max_prompt_tokens
    response = max(2, round(lengths_of(config, assumed).average))
    visual = capability.visual and longest
    return {
        "average": full(budget, capability.prompt, response, config.rl.group, capability.visual, capability.frame),
        "longest": full(
            budget, longest, config.rollout.max_new_tokens, config.rl.group, visual, min(visual, capability.frame) or 1
        ),
    }


def _modality(data: BranchData) -> Modality:
    """The heaviest kind of media that the data has."""
    if data.mini is not None:
        return data.mini.modality
    parts = [_modality(part) for part in data.mixture]
    if data.train is not None:
        fields = data.train.fields
        parts.append("video" if fields.videos else "image" if fields.images else "text")
    return max(parts, key=("text", "image", "video").index)
