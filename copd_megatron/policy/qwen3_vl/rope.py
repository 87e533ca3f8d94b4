"""Positions of text and image tokens, and their rotary frequencies (M-RoPE).

Text counts on by one on all three axes (time, row, column). An image begins at one moment, from which its frames count
on in time and its merged patches spread over rows and columns; the text after it continues behind the image's larger
side. Qwen3-VL lets frequencies listen to the axes in turn, Qwen2.5-VL axis after axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from copd_megatron.errors import DataError


def prompt_positions(token_ids: Sequence[int], grid_thw: Tensor | None, image_token_id: int, merge: int) -> Tensor:
    """Position ids int64 [3, S] of a prompt of S tokens.

    `grid_thw` int64 [images, 3] counts each image's patches, of which `merge` × `merge` make one token. DataError if
    the image tokens do not stand in runs that fit the grids.
    """
    ids = torch.as_tensor(token_ids)
    sizes = [] if grid_thw is None else [(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]
    image_at = (ids == image_token_id).nonzero().flatten()
    expected = sum(t * h * w for t, h, w in sizes)
    if len(image_at) != expected:
        raise DataError(
            f"the prompt has {len(image_at)} image tokens, but its {len(sizes)} images make {expected}; "
            "token ids and images must come from one processor call"
        )
    parts: list[Tensor] = []
    token = position = seen = 0
    for t, h, w in sizes:
        start, count = int(image_at[seen]), t * h * w
        if int(image_at[seen + count - 1]) != start + count - 1:
            raise DataError(f"the image at token {start} is interrupted: its {count} tokens must be adjacent")
        parts.append(_text(position, start - token))
        position += start - token
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack([axis.flatten() for axis in axes]) + position)
        token, position, seen = start + count, position + max(h, w), seen + count
    parts.append(_text(position, len(ids) - token))
    return torch.cat(parts, dim=1)


def continuation_positions(prompt: Tensor, length: int) -> Tensor:
    """Position ids int64 [3, length] of the tokens that follow a prompt with position ids [3, S]."""
    return _text(int(prompt.max()) + 1, length)


def text_positions(length: int) -> Tensor:
    """Position ids int64 [3, length] of a prompt without images."""
    return _text(0, length)


def _text(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, -1)


def inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    """Rotary frequencies float32 [dim / 2], highest first."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def interleaved_axes(half: int, section: Sequence[int]) -> Tensor:
    """Which axis (0 time, 1 row, 2 column) each of `half` frequencies listens to, int64 [half]: time, row, column in
    turn until an axis has had its `section` share; time takes what is left."""
    axes = torch.zeros(half, dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * section[axis] : 3] = axis
    return axes


def chunked_axes(section: Sequence[int]) -> Tensor:
    """The same where the frequencies are shared out in one piece per axis: `section` counts all of them."""
    return torch.repeat_interleave(torch.arange(3), torch.tensor(section))


def text_angles(
    position_ids: Tensor, dim: int, theta: float, section: Sequence[int], interleaved: bool = True
) -> Tensor:
    """Rotary angles float32 [T, 1, dim] for `position_ids` [3, T]; both halves of a head turn alike."""
    device = position_ids.device
    axes = interleaved_axes(dim // 2, section) if interleaved else chunked_axes(section)
    positions = position_ids[axes.to(device)].T
    angles = positions.float() * inverse_frequencies(dim, theta, device)
    return torch.cat([angles, angles], dim=-1)[:, None]


def vision_angles(rows: Tensor, columns: Tensor, dim: int, theta: float) -> Tensor:
    """Rotary angles float32 [patches, 1, dim]: a quarter of a head follows the row, a quarter the column, twice."""
    frequencies = inverse_frequencies(dim // 2, theta, rows.device)
    angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=-1)
    return torch.cat([angles, angles], dim=-1)[:, None]
