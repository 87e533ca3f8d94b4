"""From rollouts to packed micro-batches (`packed.py` describes their layout).

Rollouts of one prompt form a group that shares the packed prompt. Groups are spread over as few micro-batches as the
token budget allows, as evenly as possible; only a group that exceeds the budget by itself is split, and its prompt is
then repeated. The result depends on the samples and their order alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from copd_megatron.errors import ConfigError
from copd_megatron.policy.packed import MicroBatch, Segments, Signals
from copd_megatron.rollout.types import Prompt, Rollout

NATIVE = -1
"""`Sample.source` of a branch's own capability."""


@dataclass(frozen=True)
class Sample:
    """A rollout and where its learning signal comes from.

    `source` is NATIVE or the index of the teacher that has scored the rollout; `advantage` is the group advantage (0
    where a teacher speaks, and for demonstrations).
    """

    rollout: Rollout
    source: int = NATIVE
    advantage: float = 0.0


@dataclass(frozen=True)
class Packed:
    """Micro-batches, and what packing did to the samples.

    `order[m]` lists the indices of the samples in micro-batch m, in packed order. `tokens` is what the policy
    computes, `unshared_tokens` what it would compute if every rollout had its own copy of its prompt.
    """

    microbatches: list[MicroBatch]
    order: list[list[int]]
    tokens: int
    unshared_tokens: int


@dataclass
class _Group:
    """Samples that continue the same prompt; `tokens` is the packed length of all of them."""

    prompt: Prompt
    tokens: int
    samples: list[int] = field(default_factory=list)


def pack(
    samples: Sequence[Sample],
    max_tokens: int,
    counts: Mapping[int, int],
    positions: Callable[[Prompt], torch.Tensor],
    media_token_ids: Sequence[int],
    old_logprobs: Sequence[torch.Tensor] | None = None,
    by_source: bool = False,
) -> Packed:
    """Pack `samples` into micro-batches of at most `max_tokens` tokens.

    `counts` gives the number of sequences per source over all data-parallel ranks: a token of sequence i weighs
    1 / (len_i · counts[source_i]), so that the weighted sum over every token of every rank is the mean over sequences
    of the mean over their tokens. `positions` computes the position ids int64 [3, S] of a prompt's tokens; a response
    goes on from the largest of them. `media_token_ids` are the tokens that stand for patches; none where no prompt has
    media. `old_logprobs`, float32 [R_i] per sample, fill `Signals.old_logprobs`. With `by_source` the samples of a
    micro-batch are all of one source, and need no scores: a resident teacher will give them.

    Raises ConfigError for a sequence longer than `max_tokens`, ValueError for samples that contradict themselves.
    """
    _check(samples, counts, scored=not by_source)
    order, microbatches = [], []
    for part in _sources(samples) if by_source else [range(len(samples))]:
        alike = by_prompt([samples[index] for index in part])
        groups = [group for members in alike for group in _cut([part[index] for index in members], samples, max_tokens)]
        for bin_ in _spread([group.tokens for group in groups], max_tokens):
            chosen = [groups[index] for index in bin_]
            order.append([index for group in chosen for index in group.samples])
            microbatches.append(_build(chosen, samples, counts, positions, media_token_ids, old_logprobs))
    return Packed(
        microbatches=microbatches,
        order=order,
        tokens=sum(batch.segments.tokens for batch in microbatches),
        unshared_tokens=sum(
            len(sample.rollout.prompt.token_ids) + len(sample.rollout.token_ids) - 1 for sample in samples
        ),
    )


def _sources(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of the samples of each source, in the order of the sources."""
    sources = sorted({sample.source for sample in samples})
    return [[index for index, sample in enumerate(samples) if sample.source == source] for source in sources]


def _check(samples: Sequence[Sample], counts: Mapping[int, int], scored: bool) -> None:
    for sample in samples:
        rollout, uid = sample.rollout, sample.rollout.prompt.uid
        if not rollout.token_ids or not rollout.prompt.token_ids:
            raise ValueError(f"{uid}: a prompt and its response need at least one token each")
        if len(rollout.logprobs) != len(rollout.token_ids):
            raise ValueError(
                f"{uid}: {len(rollout.token_ids)} response tokens but {len(rollout.logprobs)} log-probabilities"
            )
        if scored and sample.source != NATIVE and rollout.teacher is None:
            raise ValueError(f"{uid}: source {sample.source} is a teacher, but the rollout carries no teacher scores")
        if counts.get(sample.source, 0) < 1:
            raise ValueError(f"{uid}: source {sample.source} is not in counts {dict(counts)}")


def by_prompt(samples: Sequence[Sample]) -> list[list[int]]:
    """Indices of samples that continue the same prompt, in order of appearance."""
    by_name: dict[tuple[str, str], list[list[int]]] = {}
    found: list[list[int]] = []
    for index, sample in enumerate(samples):
        prompt = sample.rollout.prompt
        namesakes = by_name.setdefault((prompt.capability, prompt.uid), [])
        for members in namesakes:
            if _same(samples[members[0]].rollout.prompt, prompt):
                members.append(index)
                break
        else:
            namesakes.append([index])
            found.append(namesakes[-1])
    return found


def _same(one: Prompt, other: Prompt) -> bool:
    """Whether two prompts are the same input, whatever they are called."""
    if one is other:
        return True
    if one.token_ids != other.token_ids or (one.media is None) != (other.media is None):
        return False
    mine, theirs = one.media, other.media
    if mine is None or theirs is None or mine is theirs:
        return True
    return (
        (mine.videos, mine.seconds) == (theirs.videos, theirs.seconds)
        and torch.equal(mine.grid_thw, theirs.grid_thw)
        and torch.equal(mine.pixel_values, theirs.pixel_values)
    )


def _cut(members: list[int], samples: Sequence[Sample], max_tokens: int) -> list[_Group]:
    prompt = samples[members[0]].rollout.prompt
    prompt_tokens = len(prompt.token_ids)
    groups = [_Group(prompt, prompt_tokens)]
    for index in members:
        response_inputs = len(samples[index].rollout.token_ids) - 1
        if prompt_tokens + response_inputs > max_tokens:
            raise ConfigError(
                f"{prompt.uid}: a prompt of {prompt_tokens} tokens and a response of {response_inputs + 1} do not fit "
                f"into a micro-batch of {max_tokens} tokens; raise precision.max_tokens_per_microbatch to at least "
                f"{prompt_tokens + response_inputs}, or lower data.max_prompt_tokens or rollout.max_new_tokens"
            )
        if groups[-1].tokens + response_inputs > max_tokens:
            groups.append(_Group(prompt, prompt_tokens))
        groups[-1].samples.append(index)
        groups[-1].tokens += response_inputs
    return groups


def _spread(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in few bins of about equal load, none above `capacity`; each bin in ascending order."""
    largest_first = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    for count in range(max(1, -(-sum(sizes) // capacity)), len(sizes) + 1):
        loads = [(0, number) for number in range(count)]
        bins: list[list[int]] = [[] for _ in range(count)]
        for index in largest_first:
            load, number = loads[0]
            if load + sizes[index] > capacity:
                break
            heapq.heapreplace(loads, (load + sizes[index], number))
            bins[number].append(index)
        else:
            return sorted(sorted(members) for members in bins)
    return []


def _build(
    groups: Sequence[_Group],
    samples: Sequence[Sample],
    counts: Mapping[int, int],
    positions: Callable[[Prompt], torch.Tensor],
    media_token_ids: Sequence[int],
    old_logprobs: Sequence[torch.Tensor] | None,
) -> MicroBatch:
    members = [index for group in groups for index in group.samples]
    chosen = [samples[index] for index in members]
    rollouts = [sample.rollout for sample in chosen]
    prompts = [group.prompt for group in groups]

    prompt_lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    lengths = torch.tensor([len(rollout.token_ids) for rollout in rollouts])
    prompt_of = torch.repeat_interleave(
        torch.arange(len(groups)), torch.tensor([len(group.samples) for group in groups])
    )
    prompt_ids = torch.tensor(list(chain.from_iterable(prompt.token_ids for prompt in prompts)))
    targets = torch.tensor(list(chain.from_iterable(rollout.token_ids for rollout in rollouts)))

    sequence = torch.repeat_interleave(torch.arange(len(rollouts)), lengths)
    place = torch.arange(len(targets)) - (lengths.cumsum(0) - lengths)[sequence]  # of a token within its response
    is_input = place < lengths[sequence] - 1

    prompt_positions = [positions(prompt) for prompt in prompts]
    next_position = torch.stack([ids.max() for ids in prompt_positions])[prompt_of] + 1
    response_positions = (next_position[sequence] + place)[is_input]

    # A response's first token is predicted at its prompt's last position, every other one at the input before it.
    first_input = len(prompt_ids) + (lengths - 1).cumsum(0) - (lengths - 1)
    prompt_end = prompt_lengths.cumsum(0)[prompt_of] - 1
    logit_index = torch.where(place == 0, prompt_end[sequence], first_input[sequence] + place - 1)

    share = torch.tensor([1.0 / (len(s.rollout.token_ids) * counts[s.source]) for s in chosen], dtype=torch.float32)
    advantage = torch.tensor([sample.advantage for sample in chosen], dtype=torch.float32)
    media = [prompt.media for prompt in prompts if prompt.media is not None]
    return MicroBatch(
        token_ids=torch.cat([prompt_ids, targets[is_input]]),
        position_ids=torch.cat([*prompt_positions, response_positions.expand(3, -1)], dim=1),
        segments=Segments(prompt_lengths, lengths - 1, prompt_of),
        logit_index=logit_index,
        targets=targets,
        sequence=sequence,
        signals=Signals(
            source=torch.tensor([sample.source for sample in chosen])[sequence],
            weight=share[sequence],
            advantage=advantage[sequence],
            engine_logprobs=torch.cat([rollout.logprobs for rollout in rollouts]),
            old_logprobs=None if old_logprobs is None else torch.cat([old_logprobs[index] for index in members]),
            **_teacher_signals(rollouts),
        ),
        pixel_values=torch.cat([one.pixel_values for one in media]) if media else None,
        grid_thw=torch.cat([one.grid_thw for one in media]) if media else None,
        # Only the prompts' part: a sampled image token is an ordinary token and has no patch.
        visual_index=torch.isin(prompt_ids, torch.tensor(media_token_ids)).nonzero()[:, 0] if media else None,
    )


def _teacher_signals(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The teachers' tensors, zero where a rollout has no teacher; nothing if no rollout has one."""
    scores = [rollout.teacher for rollout in rollouts]
    widths = {score.top_ids.shape[1] for score in scores if score is not None}
    if not widths:
        return {}
    if len(widths) > 1:
        raise ValueError(f"teachers' scores in one batch differ in top-k: {sorted(widths)}")
    width = widths.pop()
    logprobs, top_ids, top_logprobs = [], [], []
    for rollout, score in zip(rollouts, scores, strict=True):
        size = len(rollout.token_ids)
        if score is None:
            logprobs.append(torch.zeros(size))
            top_ids.append(torch.zeros(size, width, dtype=torch.int64))
            top_logprobs.append(torch.zeros(size, width))
        elif len(score.logprobs) != size or len(score.top_ids) != size:
            raise ValueError(
                f"{rollout.prompt.uid}: teacher {score.teacher!r} scored {len(score.logprobs)} of {size} tokens"
            )
        else:
            logprobs.append(score.logprobs)
            top_ids.append(score.top_ids)
            top_logprobs.append(score.top_logprobs)
    return {
        "teacher_logprobs": torch.cat(logprobs),
        "teacher_top_ids": torch.cat(top_ids),
        "teacher_top_logprobs": torch.cat(top_logprobs),
    }
