"""What we export loads in a server, for every family, and answers as transformers does; so do new weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import END, FRAMES, build_folder, config_of, qwen2_5_vl, save

from copd_megatron.errors import WeightsError
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.sglang.endpoints import Endpoints
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.rollout.sglang.shared_memory import SharedMemory
from copd_megatron.rollout.types import Prompt, Sampling
from copd_megatron.weights.convert import to_hf, to_megatron
from copd_megatron.weights.hf import HfFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

GREEDY = Sampling(max_new_tokens=10, stop_token_ids=(END,), temperature=0.0)
PATCH = 14
"""Of the published Qwen2.5-VL. Patches of another size are to sglang features that a tower has made already."""
FAMILIES = ["qwen3_vl", "qwen3_vl_tied", "qwen3_vl_moe", "qwen3", "qwen3_moe", "qwen2_5_vl"]


def model(folder: Path, family: str, seed: int) -> Path:
    if family.startswith("qwen3_vl"):
        experts = family.endswith("moe")
        # sglang's Qwen3-VL-MoE takes three DeepStack layers, and experts everywhere, as all published ones have.
        return build_folder(folder, family.endswith("tied"), seed, experts, deepstack=3 if experts else 1, dense=())
    config = qwen2_5_vl(tied=False, patch=PATCH) if family == "qwen2_5_vl" else config_of(family)
    if family == "qwen3_moe":
        config.mlp_only_layers = []
    return save(folder, config, seed)


def published_patches(prompt: Prompt) -> Prompt:
    """`prompt` with patches of PATCH × PATCH pixels."""
    if prompt.media is None:
        return prompt
    random = torch.Generator().manual_seed(len(prompt.token_ids))
    pixels = torch.randn(len(prompt.media.pixel_values), 3 * FRAMES * PATCH**2, generator=random)
    return replace(prompt, media=replace(prompt.media, pixel_values=pixels))


@pytest.mark.parametrize(("deepstack", "reason"), [(1, "exactly three DeepStack"), (3, "layers without experts")])
def test_a_model_that_servers_compute_wrongly_is_refused(tmp_path: Path, deepstack: int, reason: str) -> None:
    folder = build_folder(tmp_path, tied=False, experts=True, deepstack=deepstack, dense=(1,))
    with pytest.raises(WeightsError, match=reason):
        SGLangEngine("text", folder, Endpoints("text", "test", ("http://127.0.0.1:9",)))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_serves(
    tmp_path: Path,
    start_server: Callable[..., Any],
    prompts: list[Prompt],
    make_videos: Callable[..., list[Prompt]],
    family: str,
) -> None:
    first, second = model(tmp_path / "first", family, 1), model(tmp_path / "second", family, 2)
    to_megatron(first, tmp_path / "checkpoint")
    to_hf(tmp_path / "checkpoint", tmp_path / "exported")
    asked = [prompt for prompt in prompts if prompt.media is None or "vl" in family]
    if "vl" in family:
        asked += make_videos(seconds=0.7 if family == "qwen2_5_vl" else None)
    if family == "qwen2_5_vl":
        asked = [published_patches(prompt) for prompt in asked]
    with start_server(tmp_path / "exported") as server:
        engine = SGLangEngine("text", tmp_path / "exported", server.endpoints("text"), SharedMemory(1 << 18))
        for version, folder in enumerate([first, second]):
            engine.update_weights(HfFolder(folder).tensors(), version)
            embedded = EmbeddedEngine("text", folder)
            ours, theirs = engine.generate(asked, GREEDY, 0), embedded.generate(asked, GREEDY, 0)
            assert [rollout.token_ids for rollout in ours] == [rollout.token_ids for rollout in theirs]
            for one, other in zip(engine.score(ours, 3, 1.0), embedded.score(ours, 3, 1.0), strict=True):
                torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
        engine.close()
