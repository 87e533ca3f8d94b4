"""The currency of the project: a `Prompt` becomes `Rollout`s, a teacher turns a rollout into `TeacherScores`.

Shape legend used everywhere: `B` sequences, `T` packed tokens, `R` response tokens, `V` vocabulary,
`K` top-k, `H` hidden, `G` rollouts per prompt (the group).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Media:
    """The images and videos of one prompt exactly as the Hugging Face processor made them, in the order in which they
    appear in the token ids: features of one after another fill the image and video tokens from left to right.

    `pixel_values` float32 [patches, channels * temporal_patch * patch * patch]; `grid_thw` int64 [items, 3], each
    item's (frames, rows, columns) counted in patches. `videos` numbers the items that are videos, ascending, and
    `seconds` says for each of them how long one of its temporal patches lasts (which is what Qwen2.5-VL's positions
    count; Qwen3-VL writes the times between the frames instead). All other items are images.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    videos: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.videos) != len(self.seconds):
            raise ValueError(f"{len(self.videos)} videos, but the seconds of {len(self.seconds)}")


@dataclass(frozen=True)
class Prompt:
    """One question, tokenised and ready for every engine and for the policy.

    `token_ids` holds one image or video token per merged patch (the processor's expansion), so that all consumers
    see the same positions. `verifier` names the function in `rewards` that judges a response against `answer`.
    """

    uid: str
    capability: str
    token_ids: tuple[int, ...]
    answer: str
    verifier: str
    text: str
    media: Media | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `n` is the number of rollouts per prompt (G)."""

    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1


@dataclass(frozen=True)
class TeacherScores:
    """A teacher's opinion of one rollout, at the rollout's own temperature.

    `logprobs` float32 [R] of the sampled tokens; `top_ids` int64 [R, K] and `top_logprobs` float32 [R, K], best
    first. `version` is the number of updates the teacher had finished.
    """

    teacher: str
    version: int
    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    `token_ids` [R] includes the stop token when `finish` is "stop". `logprobs` float32 [R] are the engine's, over
    the full vocabulary at the sampling temperature (never renormalised for top-p or top-k). `policy_version` is the
    number of updates the sampling weights had behind them.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    logprobs: torch.Tensor
    finish: Literal["stop", "length"]
    policy_version: int
    text: str
    reward: float | None = None
    teacher: TeacherScores | None = None
