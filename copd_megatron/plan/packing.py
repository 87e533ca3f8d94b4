"""The shape of a packed micro-batch, and the calls of attention that `policy.attention.AttentionPlan` makes of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from copd_megatron.policy.attention import SHORT


@dataclass(frozen=True)
class Call:
    """One call of attention: `rows` of `queries` × `keys`, under a mask or not. `whole` tells that its queries and keys
    are views of all tokens, which it then keeps."""

    rows: int
    queries: int
    keys: int
    masked: bool
    whole: bool = False

    @property
    def query_slots(self) -> int:
        """Places of queries, padding included."""
        return self.rows * self.queries

    @property
    def key_slots(self) -> int:
        """Places of keys."""
        return self.rows * self.keys

    @property
    def mask(self) -> int:
        """Elements of the mask; 0 without one."""
        return self.rows * self.queries * self.keys if self.masked else 0


@dataclass(frozen=True)
class Packing:
    """A micro-batch: tokens of each prompt, of each response (all of them, one more than its inputs) and the number of
    the prompt behind which it stands; patches of each frame."""

    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    prompt_of: tuple[int, ...]
    frames: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """T, the packed tokens."""
        return sum(self.prompts) + sum(self.responses) - len(self.responses)

    @property
    def predicted(self) -> int:
        """R, the response tokens, each of which has logits."""
        return sum(self.responses)

    @property
    def patches(self) -> int:
        """Of all frames."""
        return sum(self.frames)

    def calls(self, cp: int) -> list[Call]:
        """Attention of a decoder layer on one of `cp` context parallel ranks."""
        alone = len(self.prompts) == 1 == len(self.responses)
        found = []
        for members in _similar(self.prompts):
            width = max(self.prompts[index] for index in members)
            found.append(Call(len(members), -(-width // cp), width, cp > 1, len(members) == 1 == cp))
        inputs = [length - 1 for length in self.responses]
        for members in _similar(inputs):
            width = max(inputs[index] for index in members)
            before = max(self.prompts[self.prompt_of[index]] for index in members)
            found.append(Call(len(members), -(-width // cp), before + width, True, alone and cp == 1))
        return found

    def frame_calls(self) -> list[Call]:
        """Attention of a layer of the vision tower, which context parallelism does not divide."""
        calls = []
        for members in _similar(self.frames):
            width = max(self.frames[index] for index in members)
            calls.append(Call(len(members), width, width, False, len(self.frames) == 1))
        return calls


def full(tokens: int, prompt: int, response: int, group: int, visual: int, frame: int) -> Packing:
    """As many groups of `group` responses to a prompt as `tokens` hold, the last one cut.

    `visual` merged patches stand in each prompt, of 4 patches each, in frames of at most `frame` merged patches.
    """
    prompts: list[int] = []
    responses: list[int] = []
    prompt_of: list[int] = []
    frames: list[int] = []
    left = tokens
    while left > prompt + 1:
        prompts.append(prompt)
        left -= prompt
        frames += [4 * size for size in _split(visual, frame)]
        for _ in range(group):
            length = min(response, left + 1)
            if length < 2:
                break
            responses.append(length)
            prompt_of.append(len(prompts) - 1)
            left -= length - 1
    return Packing(tuple(prompts), tuple(responses), tuple(prompt_of), tuple(frames))


def _split(whole: int, most: int) -> Iterator[int]:
    while whole > 0:
        yield min(most, whole)
        whole -= most


def _similar(lengths: tuple[int, ...] | list[int]) -> list[list[int]]:
    """Numbers of the sequences that share a call, as `AttentionPlan` groups them."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        if length > 0:
            by_size[math.ceil(math.log2(max(length, SHORT)))].append(index)
    return [by_size[size] for size in sorted(by_size)]
