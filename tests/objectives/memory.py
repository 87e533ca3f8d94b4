"""What is allocated while a piece of code runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Outputs(TorchDispatchMode):
    """Records the size of every operator's results, forward and backward; collectives are operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: Counter[tuple[str, torch.dtype]] = Counter()
        """By operator and format, those of the largest result."""

    def largest(self, dtype: torch.dtype) -> int:
        """Elements of the largest tensor of this format that an operator has returned."""
        return max(elements for (_, format), elements in self.elements.items() if format == dtype)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                key = str(function), value.dtype
                self.elements[key] = max(self.elements[key], value.numel())
        return result
