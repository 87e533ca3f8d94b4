"""Prompts of different lengths side by side, as the language model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from copd_megatron.errors import DataError
from copd_megatron.rollout.types import Prompt


@dataclass(frozen=True)
class PromptBatch:
    """B prompts, padded on the left to a length of S, so that all of them end in the same column.

    `token_ids` int64 [B, S]; `mask` bool [B, S], False on padding, or None where nothing is padded (attention is
    faster without one); `position_ids` int64 [3, B, S] (time, row, column; alike where there are no images);
    `next_position` int64 [B] is where the response starts. `pixel_values` and `grid_thw` hold all images in the order
    of the prompts, or are None.
    """

    token_ids: torch.Tensor
    mask: torch.Tensor | None
    position_ids: torch.Tensor
    next_position: torch.Tensor
    pixel_values: torch.Tensor | None
    grid_thw: torch.Tensor | None


def takes_images(config: Any) -> bool:
    """Whether a model with the configuration `config` sees images."""
    return hasattr(config, "vision_config")


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
    """Raise DataError if the prompt has no or unknown tokens, or images that the model does not see or that disagree
    with its image tokens.

    A prompt whose image tokens came without the images would be answered or scored blindly, with no other sign than
    worse numbers (docs/method.md, pitfall 10).
    """
    check_tokens(prompt.token_ids, config, f"prompt {prompt.uid}")
    if not takes_images(config):
        if prompt.media is not None:
            raise DataError(f"prompt {prompt.uid}: has images, but a {config.model_type!r} takes text alone")
        return
    patches = merged = 0
    if prompt.media is not None:
        patches = int(prompt.media.grid_thw.prod(-1).sum())
        merged = patches // config.vision_config.spatial_merge_size**2
        rows = prompt.media.pixel_values.shape[0]
        if rows != patches:
            raise DataError(f"prompt {prompt.uid}: pixel_values has {rows} patches, grid_thw counts {patches}")
    tokens = prompt.token_ids.count(config.image_token_id)
    if tokens != merged:
        raise DataError(
            f"prompt {prompt.uid}: {tokens} image tokens, but its images make {merged} merged patches; "
            "tokens and images must come from one call of the processor and travel together"
        )
    if config.video_token_id in prompt.token_ids:
        raise DataError(f"prompt {prompt.uid}: has video tokens, but prompts carry images only")


def prompt_batch(prompts: Sequence[Prompt], model: Any, device: torch.device) -> PromptBatch:
    """Put checked prompts side by side on `device`. Positions are those of the model's own `get_rope_index`."""
    lengths = [len(prompt.token_ids) for prompt in prompts]
    width = max(lengths)
    token_ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.bool)
    position_ids = torch.zeros(3, len(prompts), width, dtype=torch.int64)
    next_position = torch.zeros(len(prompts), dtype=torch.int64)
    # Prompts of one task mostly share a layout, and get_rope_index is a Python loop.
    known: dict[object, torch.Tensor] = {}
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        ids = torch.tensor(prompt.token_ids)
        layout = None
        if prompt.media is not None:
            is_image = ids == model.config.image_token_id
            layout = is_image.numpy().tobytes(), prompt.media.grid_thw.numpy().tobytes()
        if (layout, length) not in known:
            known[layout, length] = _positions(prompt, ids, model)
        positions = known[layout, length]
        token_ids[row, width - length :] = ids
        mask[row, width - length :] = True
        position_ids[:, row, width - length :] = positions
        next_position[row] = positions.max() + 1
    images = [prompt.media for prompt in prompts if prompt.media is not None]
    return PromptBatch(
        token_ids=token_ids.to(device),
        mask=None if min(lengths) == width else mask.to(device),
        position_ids=position_ids.to(device),
        next_position=next_position.to(device),
        pixel_values=torch.cat([image.pixel_values for image in images]).to(device) if images else None,
        grid_thw=torch.cat([image.grid_thw for image in images]).to(device) if images else None,
    )


def _positions(prompt: Prompt, ids: torch.Tensor, model: Any) -> torch.Tensor:
    """Positions int64 [3, length] of one prompt."""
    if prompt.media is None:
        return torch.arange(len(ids)).expand(3, -1)
    is_image = (ids == model.config.image_token_id).int()
    positions, _ = model.get_rope_index(
        ids[None], mm_token_type_ids=is_image[None], image_grid_thw=prompt.media.grid_thw
    )
    return positions[:, 0]
