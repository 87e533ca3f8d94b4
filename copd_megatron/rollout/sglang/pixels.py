"""Images and videos on their way to a server: as the Hugging Face processor made them, in a string, without loss.

Nothing is decoded, resized or normalised a second time, so a teacher cannot see other pixels than its student. Almost
every value is one of 256 per colour (an 8-bit picture, normalised), so a byte and a table replace four bytes; anything
else travels as it is. `encode` runs in the client, `decode` in the server (processors/qwen_vl.py).
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SCHEME = "copd-patches:"
"""How an item of a request's `image_data` or `video_data` begins that `decode` understands."""

_COLOURS = 3


@dataclass(frozen=True)
class Patches:
    """All images of one prompt, or all frames of its videos.

    `pixel_values` float32 [patches, 3 * temporal * size * size]; `grid_thw` int64 [items, 3]; `offsets` are the first
    and last place of each item's tokens in the prompt; `weights` names those that are to see them. `seconds` says how
    long each frame lasts, nothing of images. `positions` int64 [3, S] are those of all the prompt's tokens, None where
    another item of the request brings them.
    """

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    offsets: tuple[tuple[int, int], ...]
    weights: str
    seconds: tuple[float, ...] = ()
    positions: torch.Tensor | None = None


def encode(patches: Patches) -> str:
    """The item for these patches."""
    values = np.ascontiguousarray(patches.pixel_values.numpy())
    item: dict[str, Any] = {
        "shape": values.shape,
        "grid_thw": patches.grid_thw.tolist(),
        "offsets": patches.offsets,
        "weights": patches.weights,
        "seconds": patches.seconds,
    }
    if patches.positions is not None:
        item["positions"] = _text(patches.positions.numpy().astype(np.int32))
    packed = _bytes_and_table(values)
    if packed is None:
        item["values"] = _text(values)
    else:
        codes, table = packed
        item |= {"codes": _text(codes), "table": _text(table)}
    return SCHEME + json.dumps(item)


def decode(text: str) -> Patches:
    """What `encode` got. Raises ValueError for an item that it did not make."""
    try:
        item = json.loads(text.removeprefix(SCHEME))
        rows, width = item["shape"]
        if "codes" in item:
            codes = _array(item["codes"], np.uint8).reshape(rows, _COLOURS, width // _COLOURS)
            table = _array(item["table"], np.float32).reshape(_COLOURS, -1)
            values = table[np.arange(_COLOURS)[:, None], codes]
        else:
            values = _array(item["values"], np.float32).copy()
        positions = None
        if "positions" in item:
            positions = torch.from_numpy(_array(item["positions"], np.int32).reshape(3, -1).astype(np.int64))
        patches = Patches(
            pixel_values=torch.from_numpy(np.ascontiguousarray(values.reshape(rows, width))),
            grid_thw=torch.tensor(item["grid_thw"], dtype=torch.int64),
            offsets=tuple((int(first), int(last)) for first, last in item["offsets"]),
            weights=str(item["weights"]),
            seconds=tuple(float(seconds) for seconds in item["seconds"]),
            positions=positions,
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"a {SCHEME!r} item is damaged: {type(error).__name__}: {error}") from error
    grid = patches.grid_thw
    if grid.ndim != 2 or grid.shape[1] != 3 or int(grid.prod(-1).sum()) != rows:
        raise ValueError(f"a {SCHEME!r} item has {rows} patches, its grid_thw {grid.tolist()}")
    if len(patches.offsets) != len(grid) or len(patches.seconds) not in (0, len(grid)):
        raise ValueError(f"a {SCHEME!r} item has {len(grid)} images or frames at {len(patches.offsets)} places")
    return patches


def identity(pixel_values: torch.Tensor, grid_thw: torch.Tensor, seconds: Sequence[float], weights: str) -> int:
    """64 bits that stand for what `weights` see in one image or frame, and for its positions. A server keeps what it
    has seen by them, and never forgets it: pixels alone would not tell 2 × 8 black patches from 4 × 4."""
    digest = blake2b(f"{weights} {grid_thw.tolist()} {list(seconds)}".encode(), digest_size=8)
    digest.update(pixel_values.contiguous().numpy().data)
    return int.from_bytes(digest.digest())


def _bytes_and_table(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]] | None:
    """Codes uint8 in the shape of `values` and what they stand for, [3, up to 256]; None if there are more values."""
    rows, width = values.shape
    if width % _COLOURS:
        return None
    # Bits and not numbers are compared, so that -0.0 stays what it is.
    by_colour = values.view(np.uint32).reshape(rows, _COLOURS, width // _COLOURS)
    levels = [np.unique(by_colour[:, colour]) for colour in range(_COLOURS)]
    most = max(map(len, levels))
    if most > 256:
        return None
    codes = np.empty(by_colour.shape, np.uint8)
    table = np.zeros((_COLOURS, most), np.uint32)
    for colour, known in enumerate(levels):
        codes[:, colour] = np.searchsorted(known, by_colour[:, colour])
        table[colour, : len(known)] = known
    return codes, table.view(np.float32)


def _text(array: npt.NDArray[Any]) -> str:
    return b64encode(array.tobytes()).decode()


def _array(text: str, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.frombuffer(b64decode(text, validate=True), dtype)
