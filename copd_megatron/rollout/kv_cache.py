"""A key/value cache that appends in place."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer


class RoomyLayer(DynamicLayer):
    """One layer's keys and values with room behind them, so that a new token is written where it belongs.

    `DynamicLayer` copies the whole layer for every token. Here `keys` and `values` are views of larger buffers, which
    grow by half when they are full. Selecting rows makes `room` for so many more tokens at once.
    """

    def __init__(self, room: int = 32) -> None:
        super().__init__()
        self._more = room
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
            everyone = torch.arange(len(key_states), device=key_states.device)
            self._room = self._make_room(everyone, end - start + end // 2)
        for buffer, states in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._room)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies next to each other."""
        self.batch_select_indices(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (repetition allowed), in that order."""
        self._room = self._make_room(indices, self._more)

    def _make_room(self, rows: torch.Tensor, more: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Move the rows `rows` into new buffers, which take `more` tokens."""
        length = self.get_seq_length()
        room = _moved(self.keys, rows, length + more), _moved(self.values, rows, length + more)
        self.keys, self.values = (buffer[:, :, :length] for buffer in room)
        return room


def roomy_cache(layers: int, room: int) -> DynamicCache:
    """An empty cache for a language model of `layers` layers with full attention; `room` as in RoomyLayer."""
    cache = DynamicCache()
    cache.layers = [RoomyLayer(room) for _ in range(layers)]
    return cache


def _moved(states: torch.Tensor, rows: torch.Tensor, capacity: int) -> torch.Tensor:
    _, heads, length, size = states.shape
    buffer = states.new_empty(len(rows), heads, capacity, size)
    buffer[:, :, :length] = states.index_select(0, rows)
    return buffer
