"""A random Qwen3-VL of a few thousand parameters with a character tokenizer, and prompts with and without images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CHARACTERS, FRAMES, IMAGE, MERGE, PATCH, SPECIAL, VISION, VISION_END, build_folder

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
    """`make_prompt("12+3=", (2, 4), ...)`: images of so many merged rows and columns, then the text."""

    def make(text: str, *sizes: tuple[int, int], uid: str | None = None) -> Prompt:
        token_ids: list[int] = []
        pixels, grids = [], []
        for number, (rows, columns) in enumerate(sizes):
            random = torch.Generator().manual_seed(100 * number + 10 * rows + columns + len(text))
            patches = rows * MERGE * columns * MERGE
            pixels.append(torch.randn(patches, 3 * FRAMES * PATCH * PATCH, generator=random))
            grids.append([1, rows * MERGE, columns * MERGE])
            token_ids += [VISION, *[IMAGE] * (rows * columns), VISION_END]
        token_ids += [len(SPECIAL) + CHARACTERS.index(character) for character in text]
        media = Media(torch.cat(pixels), torch.tensor(grids)) if sizes else None
        return Prompt(uid or f"{text}{sizes}", "test", tuple(token_ids), "", "exact", text, media)

    return make


@pytest.fixture(scope="session")
def prompts(make_prompt: Callable[..., Prompt]) -> list[Prompt]:
    """Text only, one image, several images of different sizes; the last has the length of the second, not its grid."""
    return [
        make_prompt("sum 12 34="),
        make_prompt("what?", (1, 4)),
        make_prompt("a", (2, 3), (1, 1), (3, 2)),
        make_prompt("9"),
        make_prompt("compare these two.", (2, 2), (2, 5)),
        make_prompt("whose", (2, 2)),
    ]
