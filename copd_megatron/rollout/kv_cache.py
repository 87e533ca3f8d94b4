"""A key/value cache that appends in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room behind them, so that a new token is written where it belongs.

    `DynamicLayer` copies the whole layer for every token. Here `keys` and `values` are views of larger buffers, which
    grow by half when they are full. Repeating or selecting rows gives up the room; the next token makes it anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key and value states [B, heads, new tokens, head size] and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            capacity = end + max(32, end // 2)
            self._room = _enlarged(self.keys, capacity), _enlarged(self.values, capacity)
        for buffer, states in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies next to each other."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (repetition allowed), in that order."""
        super().batch_select_indices(indices)
        self._room = None


def roomy_cache(layers: int) -> DynamicCache:
    """An empty cache for a language model of `layers` layers with full attention."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer() for _ in range(layers)]
    return cache


def _enlarged(states: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, length, size = states.shape
    buffer = states.new_empty(rows, heads, capacity, size)
    buffer[:, :, :length] = states
    return buffer
