"""scikit-learn's handwritten digits, every scan in one split, and pictures and videos made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from copd_megatron.data.example import Video
from copd_megatron.data.mini.task import Split
from copd_megatron.randomness import seed_for

if TYPE_CHECKING:
    from PIL import Image

PER_CLASS: dict[Split, int] = {"cold_start": 20, "validation": 20, "test": 30}
"""Scans of each digit in the small splits: 200, 200 and 300 in all. The other 1,097 are for training."""

FRAMES_PER_DIGIT = 2


@cache
def scans(split: Split) -> tuple[np.ndarray, ...]:
    """The scans of `split`: for each digit 0 to 9 a float32 array [scans, 8, 8], 0 black to 1 white."""
    images, labels = _all_scans()
    cuts = np.cumsum(list(PER_CLASS.values()))
    chosen = []
    for digit in range(10):
        of_digit = np.flatnonzero(labels == digit)
        shuffled = np.random.default_rng(seed_for(0, "mini scans", digit)).permutation(of_digit)
        parts = dict(zip([*PER_CLASS, "train"], np.split(shuffled, cuts), strict=True))
        chosen.append(images[parts[split]])
    return tuple(chosen)


def picture(digits: Sequence[int], split: Split, noise: float, rng: np.random.Generator) -> Image.Image:
    """`digits` from left to right as random scans of `split`: an RGB image 8 pixels high, 8 wide per digit.

    Gaussian noise of standard deviation `noise`, the same in all three colours, is added before rounding to 8 bit.
    """
    return _noisy(np.concatenate(_drawn(digits, split, rng), axis=1), noise, rng)


def clip(digits: Sequence[int], split: Split, noise: float, rng: np.random.Generator) -> Video:
    """`digits` one after another as random scans of `split`, each for two frames of 8 x 8 pixels, one frame per second.

    Two frames are one temporal patch of the model. The noise of every frame is its own.
    """
    drawn = _drawn(digits, split, rng)
    return Video.of(tuple(_noisy(scan, noise, rng) for scan in drawn for _ in range(FRAMES_PER_DIGIT)), fps=1.0)


def _drawn(digits: Sequence[int], split: Split, rng: np.random.Generator) -> list[np.ndarray]:
    available = scans(split)
    return [available[digit][rng.integers(len(available[digit]))] for digit in digits]


def _noisy(canvas: np.ndarray, noise: float, rng: np.random.Generator) -> Image.Image:
    from PIL import Image

    canvas = canvas + noise * rng.standard_normal(canvas.shape, dtype=np.float32)
    grey = Image.fromarray((np.clip(canvas, 0, 1) * 255).round().astype(np.uint8))
    return grey.convert("RGB")


@cache
def _all_scans() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return (loaded.images / 16).astype(np.float32), loaded.target
