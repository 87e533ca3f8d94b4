"""Rotary angles from positions (M-RoPE; rollout/positions.py says which position a token has).

Qwen3-VL lets frequencies listen to the axes time, row and column in turn, Qwen2.5-VL axis after axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
