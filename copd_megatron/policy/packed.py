"""Micro-batches without padding, in which the responses of a group share one copy of their prompt.

Token order of a micro-batch: every prompt's tokens one after another, then every response's *input* tokens one after
another. A response's input leaves out its last token, because nothing is predicted from it. The G responses to one
prompt all continue the same packed prompt: the prompt is computed once, with gradient, in place of G times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch

from copd_megatron.policy.context import WHOLE, Stripe


@dataclass(frozen=True)
class Segments:
    """Who attends to whom.

    Prompt i attends within itself (causally, or to all of itself if not `causal`). Response j attends to the whole of
    prompt `prompt_of[j]` and causally to itself. `prompt_lengths` int64 [prompts], `response_lengths` int64
    [responses] (input tokens, may be 0), `prompt_of` int64 [responses]. CPU tensors; the total is T.
    """

    prompt_lengths: torch.Tensor
    response_lengths: torch.Tensor
    prompt_of: torch.Tensor
    causal: bool = True

    @property
    def tokens(self) -> int:
        """T, the number of packed tokens."""
        return int(self.prompt_lengths.sum() + self.response_lengths.sum())


@dataclass(frozen=True)
class Signals:
    """What the objectives need, one entry per response token (R in all, responses in packed order).

    `source` int64 [R]: -1 for the branch's own capability (native), else the index of the teacher. `weight` float32
    [R] turns a sum over tokens into the objective's mean (over a sequence's tokens, then over sequences of the same
    source, over the whole batch and all data-parallel ranks). `advantage` [R] is the group advantage (0 where a
    teacher speaks). `engine_logprobs` [R] are those of the sampling engine. `old_logprobs` [R] are the trainer's own
    before the first update on this batch; None means the update is the first, and the current ones are taken.
    Teacher tensors are None in a batch without teachers; rows of native tokens are then ignored. A resident teacher
    (resident.py) knows more than its top-k: `teacher_tail` [R], the log-probability of all other tokens together, and,
    for losses over the whole vocabulary, `teacher_logits`, which computes the logits [R, Vp] of this rank's columns.
    """

    source: torch.Tensor
    weight: torch.Tensor
    advantage: torch.Tensor
    engine_logprobs: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    teacher_logprobs: torch.Tensor | None = None
    teacher_top_ids: torch.Tensor | None = None
    teacher_top_logprobs: torch.Tensor | None = None
    teacher_tail: torch.Tensor | None = None
    teacher_logits: Callable[[], torch.Tensor] | None = None


@dataclass(frozen=True)
class Lesson:
    """What a resident teacher says about the response tokens that this rank computes of a micro-batch (R counts those).

    The fields are those of `Signals` whose names begin with `teacher_`.
    """

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor
    tail: torch.Tensor
    logits: Callable[[], torch.Tensor] | None


@dataclass(frozen=True)
class MicroBatch:
    """One pass through the policy.

    `token_ids` int64 [T]; `position_ids` int64 [3, T] (time, row, column: interleaved M-RoPE); `pixel_values`
    [patches, patch dim] and `grid_thw` [items, 3] of the prompts' images and videos in order, or None; `visual_index`
    int64 [merged patches] says where in T each merged patch goes. `logit_index` int64 [R] is the position whose hidden
    state predicts response token r (the first token of a response is predicted from its prompt's last token); `targets`
    int64 [R] are the response tokens; `sequence` int64 [R] numbers the response a token belongs to.

    Under context parallelism it is one rank's share (`context.share`): T and R count this rank's tokens, those in
    `stripe`; `response_rows` int64 [R] and `visual_rows` say which of the whole batch's response tokens and merged
    patches are among them, and `segments` describe the whole batch. `frame` is the number of rows in what travels
    between pipeline stages; 0: as many as it takes. `lesson` is what a resident teacher says about this rank's share.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    logit_index: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    signals: Signals
    pixel_values: torch.Tensor | None = None
    grid_thw: torch.Tensor | None = None
    visual_index: torch.Tensor | None = None
    stripe: Stripe = WHOLE
    response_rows: torch.Tensor | None = None
    visual_rows: torch.Tensor | None = None
    frame: int = 0
    lesson: Lesson | None = None

    def taught(self) -> MicroBatch:
        """This rank's share with its lesson, if any, among the signals."""
        if self.lesson is None:
            return self
        values = {f"teacher_{field.name}": getattr(self.lesson, field.name) for field in fields(self.lesson)}
        return replace(self, signals=replace(self.signals, **values), lesson=None)


def idle() -> MicroBatch:
    """A micro-batch that teaches nothing, for a rank that has to keep up with the others: one token predicts another,
    with weight 0."""
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    nothing = torch.zeros(1)
    return MicroBatch(
        token_ids=zero,
        position_ids=zero.expand(3, -1),
        segments=Segments(one, zero, zero),
        logit_index=zero,
        targets=zero,
        sequence=zero,
        signals=Signals(source=-one, weight=nothing, advantage=nothing, engine_logprobs=nothing),
    )
