"""Prompts of different lengths side by side, as the language model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from copd_megatron.errors import DataError
from copd_megatron.rollout.positions import MediaTokens, media_blocks, prompt_positions, text_positions
from copd_megatron.rollout.types import Prompt


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, padded on the left to a length of S, so that all of them end in the same column.

    `token_ids` int64 [B, S]; `mask` bool [B, S], False on padding, or None where nothing is padded (attention is
    faster without one); `position_ids` int64 [3, B, S] (time, row, column; alike where there are no media);
    `next_position` int64 [B] is where the response starts. `pixel_values` and `grid_thw` hold all images and videos in
    the order of the prompts, `visual` bool [B, S] says which tokens are theirs; None where there are none.
    """

    token_ids: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor
    next_position: torch.Tensor
    visual: torch.Tensor | None
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None


def check_tokens(token_ids: Sequence[int], config: Any, owner: str) -> None:
    """Raise DataError if there are no tokens, or one that is not in the vocabulary; `owner` says whose they are."""
    vocabulary = config.get_text_config().vocab_size
    if not token_ids:
        raise DataError(f"{owner}: no tokens, expected at least one")
    if min(token_ids) < 0 or max(token_ids) >= vocabulary:
        wrong = next(token for token in token_ids if not 0 <= token < vocabulary)
        raise DataError(
            f"{owner}: token {wrong} is not in the model's vocabulary of {vocabulary}; "
            "it must come from this model's tokenizer"
        )


def check_prompt(prompt: Prompt, config: Any) -> None:
    """Raise DataError if the prompt has no or unknown tokens, or media that the model does not see or that disagree
    with its image and video tokens.

    A prompt whose image tokens came without the images would be answered or scored blindly, with no other sign than
    worse numbers (docs/method.md, pitfall 10).
    """
    check_tokens(prompt.token_ids, config, f"prompt {prompt.uid}")
    tokens = MediaTokens.of(config)
    if tokens is None:
        if prompt.media is not None:
            raise DataError(f"prompt {prompt.uid}: has images or videos, but a {config.model_type!r} takes text alone")
        return
    if prompt.media is not None:
        patches, rows = int(prompt.media.grid_thw.prod(-1).sum()), prompt.media.pixel_values.shape[0]
        if rows != patches:
            raise DataError(f"prompt {prompt.uid}: pixel_values has {rows} patches, grid_thw counts {patches}")
    try:
        media_blocks(prompt.token_ids, prompt.media, tokens)
    except DataError as error:
        raise DataError(f"prompt {prompt.uid}: {error}") from error


def prompt_batch(prompts: Sequence[Prompt], tokens: MediaTokens | None, device: torch.device) -> PromptBatch:
    """Put checked prompts side by side on `device`, for a model that takes media as `tokens` say."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    width = max(lengths)
    token_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    position_ids = torch.zeros(3, len(prompts), width, dtype=torch.int64)
    next_position = torch.zeros(len(prompts), dtype=torch.int64)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        positions = text_positions(length)
        if prompt.media is not None and tokens is not None:
            positions = prompt_positions(prompt.token_ids, prompt.media, tokens)
        token_ids[row, width - length :] = torch.tensor(prompt.token_ids)
        mask[row, width - length :] = True
        position_ids[:, row, width - length :] = positions
        next_position[row] = positions.max() + 1
    media = [prompt.media for prompt in prompts if prompt.media is not None]
    visual = None
    if media and tokens is not None:
        visual = torch.isin(token_ids, torch.tensor([tokens.image, tokens.video])).to(device)
    return PromptBatch(
        token_ids=token_ids.to(device),
        mask=None if min(lengths) == width else mask.to(device),
        position_ids=position_ids.to(device),
        next_position=next_position.to(device),
        visual=visual,
        pixel_values=torch.cat([one.pixel_values for one in media]).to(device) if media else None,
        grid_thw=torch.cat([one.grid_thw for one in media]).to(device) if media else None,
    )
