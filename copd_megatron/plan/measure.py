"""torch's own count of what a forward and backward pass keep and hold: what the plan's activations are checked with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(run: Callable[[], Any], apart: Iterable[Tensor]) -> tuple[int, Any]:
    """Bytes of the distinct storages that autograd saves while `run` runs, without those of `apart`; its result."""
    known = {tensor.untyped_storage().data_ptr() for tensor in apart}
    # Held here, so that no address is used twice.
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known:
            saved.setdefault(place, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()), result


class Peak(TorchDispatchMode):
    """While it lasts, the largest sum of the storages that operators have made and that are still there, in bytes;
    without those of `apart`."""

    def __init__(self, apart: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self._now = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._apart = {tensor.untyped_storage().data_ptr() for tensor in apart}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage in self._seen or storage.data_ptr() in self._apart:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self._now += size
        self.bytes = max(self.bytes, self._now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._now -= size
