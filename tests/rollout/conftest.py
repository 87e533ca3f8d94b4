"""A random Qwen3-VL of a few thousand parameters with a character tokenizer, and prompts with and without images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import (
    CHARACTERS,
    EXPERTS,
    FRAMES,
    IMAGE,
    MERGE,
    PATCH,
    SPECIAL,
    TEXT,
    VIDEO,
    VISION,
    VISION_END,
    save,
)

from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.rollout.types import Images, Prompt


def build_folder(folder: Path, tied: bool, seed: int = 0, experts: bool = False) -> Path:
    """A Qwen3-VL; with `experts`, in two of three layers."""
    declare_torchvision_schemas()
    import transformers

    config = getattr(transformers, "Qwen3VLMoeConfig" if experts else "Qwen3VLConfig")(
        text_config={
            **TEXT,
            **({key: value for key, value in EXPERTS.items() if key != "norm_topk_prob"} if experts else {}),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": FRAMES,
            "out_hidden_size": 48,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    return save(folder, config, seed)


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
        images = Images(torch.cat(pixels), torch.tensor(grids)) if sizes else None
        return Prompt(uid or f"{text}{sizes}", "test", tuple(token_ids), "", "exact", text, images)

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
