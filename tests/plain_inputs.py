"""What a plain transformers model takes for a prompt with images and videos and a response behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from copd_megatron.rollout.types import Media


def plain_inputs(
    model: Any, prompt: Sequence[int], media: Media | None, response: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """Arguments of `model`'s forward, one row. Positions are those of its own `get_rope_index` for the prompt, from
    the largest of which the response goes on, as in transformers' `generate`."""
    ids = torch.tensor([[*prompt, *response]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if media is None:
        return inputs
    before = positions_of(model, prompt, media)
    after = torch.arange(len(response)) + before.max() + 1
    inputs["position_ids"] = torch.cat([before, after.expand(3, 1, -1)], dim=-1)
    images, videos = (_part(media, which) for which in (False, True))
    for name, part in (("pixel_values", images), ("pixel_values_videos", videos)):
        if part is not None:
            inputs[name] = part[0].to(model.dtype)
    return inputs | _grids(images, videos)


def positions_of(model: Any, prompt: Sequence[int], media: Media | None) -> torch.Tensor:
    """Position ids int64 [3, 1, S], by transformers."""
    ids = torch.tensor([prompt])
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    grids = {}
    if media is not None:
        grids = _grids(*(_part(media, which) for which in (False, True)))
        if media.seconds:
            grids["second_per_grid_ts"] = torch.tensor(media.seconds)
    found: torch.Tensor = model.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)[0]
    return found


def generate_inputs(model: Any, prompt: Sequence[int], media: Media | None) -> dict[str, torch.Tensor]:
    """The same for `generate`, which computes the positions itself."""
    inputs = plain_inputs(model, prompt, media)
    if inputs.pop("position_ids", None) is None or media is None:
        return inputs
    ids = inputs["input_ids"]
    inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id)
    if media.seconds and model.config.model_type == "qwen2_5_vl":
        inputs["second_per_grid_ts"] = torch.tensor(media.seconds)
    return inputs


def _part(media: Media, videos: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Pixels and grids of the videos, or of the images."""
    chosen = [number for number in range(len(media.grid_thw)) if (number in media.videos) == videos]
    if not chosen:
        return None
    pixels = media.pixel_values.split(media.grid_thw.prod(1).tolist())
    return torch.cat([pixels[number] for number in chosen]), media.grid_thw[chosen]


def _grids(images: Any, videos: Any) -> dict[str, torch.Tensor]:
    named = (("image_grid_thw", images), ("video_grid_thw", videos))
    return {name: part[1] for name, part in named if part is not None}
