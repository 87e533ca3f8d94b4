"""A random Qwen3-VL of a few thousand parameters with a character tokenizer, and prompts of text, images and videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CHARACTERS, FRAMES, IMAGE, MERGE, PATCH, SPECIAL, VIDEO, VISION, VISION_END, build_folder

from copd_megatron.rollout.types import Media, Prompt


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with separate input and output embeddings."""
    return build_folder(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="session")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose output embedding is its input embedding."""
    return build_folder(tmp_path_factory.mktemp("tied_model"), tied=True, seed=1)


@pytest.fixture(scope="session")
def expert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts."""
    return build_folder(tmp_path_factory.mktemp("expert_model"), tied=False, seed=2, experts=True)


@pytest.fixture(scope="session")
def make_prompt() -> Callable[..., Prompt]:
    """`make_prompt("12+3=", (2, 4), (3, 2, 4), ...)`: images of so many merged rows and columns, videos of so many
    frames, rows and columns, then the text. The frames of a video stand apart, behind their times, unless `seconds`
    says how long one lasts."""

    def make(text: str, *sizes: tuple[int, ...], uid: str | None = None, seconds: float | None = None) -> Prompt:
        token_ids: list[int] = []
        pixels, grids = [], []
        for number, (*frames, rows, columns) in enumerate(sizes):
            random = torch.Generator().manual_seed(100 * number + 10 * rows + columns + len(text))
            count = frames[0] if frames else 1
            patches = count * rows * MERGE * columns * MERGE
            pixels.append(torch.randn(patches, 3 * FRAMES * PATCH * PATCH, generator=random))
            grids.append([count, rows * MERGE, columns * MERGE])
            if not frames:
                token_ids += [VISION, *[IMAGE] * (rows * columns), VISION_END]
            elif seconds is not None:
                token_ids += [VISION, *[VIDEO] * (count * rows * columns), VISION_END]
            else:
                for frame in range(count):
                    token_ids += [*spelt(f"<{frame}.5 s>"), VISION, *[VIDEO] * (rows * columns), VISION_END]
        token_ids += spelt(text)
        videos = tuple(number for number, size in enumerate(sizes) if len(size) == 3)
        lasting = (1.0 if seconds is None else seconds,) * len(videos)
        media = Media(torch.cat(pixels), torch.tensor(grids), videos, lasting) if sizes else None
        return Prompt(uid or f"{text}{sizes}{seconds}", "test", tuple(token_ids), "", "exact", text, media)

    def spelt(text: str) -> list[int]:
        return [len(SPECIAL) + CHARACTERS.index(character) for character in text]

    return make


@pytest.fixture(scope="session")
def prompts(make_prompt: Callable[..., Prompt]) -> list[Prompt]:
    """Text alone, one image, several images of different sizes; the last has the length of the second, not its grid."""
    return [
        make_prompt("sum 12 34="),
        make_prompt("what?", (1, 4)),
        make_prompt("a", (2, 3), (1, 1), (3, 2)),
        make_prompt("9"),
        make_prompt("compare these two.", (2, 2), (2, 5)),
        make_prompt("whose", (2, 2)),
    ]


@pytest.fixture(scope="session")
def make_videos(make_prompt: Callable[..., Prompt]) -> Callable[..., list[Prompt]]:
    """`make_videos(seconds)`: a video, an image and a video, two videos around an image, each of another shape. With
    `seconds` they are as Qwen2.5-VL has them, and the first lasts longer than it is wide."""

    def make(seconds: float | None = None) -> list[Prompt]:
        return [
            make_prompt("sum?", (3, 1, 2), seconds=seconds),
            make_prompt("which one?", (2, 2), (2, 2, 3), seconds=seconds),
            make_prompt("a", (2, 1, 1), (1, 3), (1, 2, 2), seconds=seconds),
        ]

    return make


@pytest.fixture(scope="session")
def videos(make_videos: Callable[..., list[Prompt]]) -> list[Prompt]:
    """As Qwen3-VL has them."""
    return make_videos()
