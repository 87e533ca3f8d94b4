"""How the kernels are started: tiles, warps and lanes.

A tile of 4,096 columns on 16 warps is 8 elements per thread, one load of 16 bytes in bfloat16. Sweeps copy tiles ahead
into shared memory (`rows.STAGES`): 24 KB in flight per row and program, where Little's law asks an H200 for about 25 KB
per multiprocessor (4.8 TB/s × 0.7 µs / 132). One or two programs per multiprocessor are then enough, and the rows at
work at a time, 132 or 264, about fit into L2, where the second sweep of a row finds what the first has read.
"""

from __future__ import annotations

from typing import Any

import torch

from copd_kernels.arguments import MAX_K

BLOCK = 4096
"""Columns of a tile of the sweeps over a row."""
WARPS = 16
SLOTS = 2 * MAX_K
"""Length of the vectors of listed ids (a top-k and the sampled token): the same for every k, so that k is an argument
and nothing is compiled for each."""
LANES = {torch.bfloat16: 4096, torch.float16: 4096, torch.float32: 2048}
"""Lanes of the top-k by format: a lane keeps its two best, so their number sets how often a row has to be done over.
Keys of float32 logits are 64 bits wide, and so take twice the registers."""
ODD_LANES = 2048
"""At most so many where rows are loaded element by element."""


REGISTERS = 65536 // (32 * WARPS)
"""What a thread may have when one program has a multiprocessor to itself."""
SHARED_REGISTERS = {"topk overlap": 80, "topk_kl": None, "partition": None}
"""Kernels of which two fit on a multiprocessor: the limit with which the assembler gets there without spilling (None:
its own choice). Rows whose width is no multiple of 16 are loaded element by element and need the registers for
addresses."""


def is_odd(widths: tuple[int, ...]) -> bool:
    """Whether the compiler cannot know that a row of such width and strides can be loaded 16 bytes at a time."""
    return any(width % 16 for width in widths)


def lanes(dtype: torch.dtype, widths: tuple[int, ...]) -> int:
    """Lanes of the top-k for logits of a format, in rows of such width and stride."""
    return min(LANES[dtype], ODD_LANES) if is_odd(widths) else LANES[dtype]


def register_limit(family: str, widths: tuple[int, ...]) -> int | None:
    """Registers per thread for a kernel of `family` on rows of such width and strides."""
    return REGISTERS if is_odd(widths) else SHARED_REGISTERS.get(family, REGISTERS)


def run(kernel: Any, family: str, rows: int, *arguments: Any, widths: tuple[int, ...], **constants: Any) -> None:
    """Start one program per row; nothing if there is none. `widths` are the row's width and the strides."""
    if rows:
        kernel[(rows,)](*arguments, num_warps=WARPS, maxnreg=register_limit(family, widths), **constants)
