from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from copd_megatron.errors import WeightsError
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.types import Prompt, Sampling
from copd_megatron.weights.hf import HfFolder

SAMPLING = Sampling(max_new_tokens=6, stop_token_ids=(1,), temperature=0.0)
EMBEDDING = "model.language_model.embed_tokens.weight"
NORM = "model.language_model.norm.weight"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(HfFolder(folder).tensors())


def changed(folder: Path) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(9)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=random) for name, tensor in weights(folder).items()
    }


def parameters(engine: EmbeddedEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}


def test_weights_handed_over_are_the_weights_in_use(folder: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    new = changed(folder)
    engine = EmbeddedEngine("text", folder)
    before = engine.generate(prompts, SAMPLING, seed=0)
    engine.update_weights(iter(new.items()), version=5)
    after = engine.generate(prompts, SAMPLING, seed=0)
    for name, tensor in parameters(engine).items():
        assert torch.equal(tensor, new[name]), name
    assert [rollout.token_ids for rollout in before] != [rollout.token_ids for rollout in after]
    assert {rollout.policy_version for rollout in before} == {0}
    assert {rollout.policy_version for rollout in after} == {5}


def test_an_engine_without_weights_waits_for_them(folder: Path, prompts: list[Prompt]) -> None:
    engine = EmbeddedEngine("text", folder, load_weights=False)
    assert engine.version == -1
    with pytest.raises(WeightsError, match="'text' has no complete set of weights"):
        engine.generate(prompts, SAMPLING, seed=0)
    engine.update_weights(weights(folder).items(), version=3)
    expected = EmbeddedEngine("text", folder).generate(prompts, SAMPLING, seed=0)
    assert [r.token_ids for r in engine.generate(prompts, SAMPLING, seed=0)] == [r.token_ids for r in expected]


def test_opening_an_engine_leaves_the_global_random_numbers_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    EmbeddedEngine("text", folder, load_weights=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_weights_go_into_a_float32_engine(folder: Path) -> None:
    engine = EmbeddedEngine("text", folder)
    engine.update_weights(((name, tensor.bfloat16()) for name, tensor in weights(folder).items()), version=1)
    assert torch.equal(parameters(engine)[NORM], weights(folder)[NORM].bfloat16().float())


def test_missing_weights_are_named_and_the_engine_refuses_to_go_on(folder: Path, prompts: list[Prompt]) -> None:
    engine = EmbeddedEngine("text", folder)
    new = changed(folder)
    kept = new.pop(NORM)
    with pytest.raises(WeightsError, match=f"missing weights: {NORM}; the model now holds parts of two versions"):
        engine.update_weights(new.items(), version=1)
    assert engine.version == 0
    with pytest.raises(WeightsError, match="no complete set of weights"):
        engine.generate(prompts, SAMPLING, seed=0)
    engine.update_weights([*new.items(), (NORM, kept)], version=1)
    assert engine.generate(prompts, SAMPLING, seed=0)[0].policy_version == 1


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.visual.extra.weight", torch.zeros(2), r"weight 'model\.visual\.extra\.weight' is unknown to the model"),
        (NORM, torch.zeros(47), rf"weight '{NORM}' has shape \[47\], the model expects \[48\]"),
    ],
)
def test_a_wrong_weight_is_named_and_changes_nothing(
    folder: Path, prompts: list[Prompt], name: str, tensor: torch.Tensor, message: str
) -> None:
    engine = EmbeddedEngine("text", folder)
    before = parameters(engine)
    with pytest.raises(WeightsError, match=message + "$"):
        engine.update_weights([(name, tensor), *changed(folder).items()], version=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(engine).items())
    assert engine.generate(prompts, SAMPLING, seed=0)[0].policy_version == 0


def test_a_weight_that_comes_twice_is_refused(folder: Path) -> None:
    new = changed(folder)
    with pytest.raises(WeightsError, match=f"'{NORM}' came twice"):
        EmbeddedEngine("text", folder).update_weights([*new.items(), (NORM, new[NORM] + 1)], version=1)


def test_an_iterator_that_fails_half_way_leaves_no_usable_mixture(folder: Path, prompts: list[Prompt]) -> None:
    engine = EmbeddedEngine("text", folder)

    def broken() -> Any:
        yield from list(changed(folder).items())[:3]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        engine.update_weights(broken(), version=1)
    with pytest.raises(WeightsError, match="no complete set of weights"):
        engine.score(EmbeddedEngine("text", folder).generate(prompts, SAMPLING, seed=0), 1, 1.0)


def test_tied_embeddings_come_under_one_name_or_both(tied_folder: Path) -> None:
    new = changed(tied_folder)
    assert "lm_head.weight" not in new
    for extra in ({}, {"lm_head.weight": new[EMBEDDING]}):
        engine = EmbeddedEngine("text", tied_folder)
        engine.update_weights([*new.items(), *extra.items()], version=1)
        assert engine.model.lm_head.weight is engine.model.model.language_model.embed_tokens.weight
        assert torch.equal(engine.model.lm_head.weight, new[EMBEDDING])


def test_tied_embeddings_that_differ_are_refused(tied_folder: Path) -> None:
    new = changed(tied_folder)
    with pytest.raises(WeightsError, match=r"'lm_head\.weight' .* differs from .*embed_tokens\.weight"):
        EmbeddedEngine("text", tied_folder).update_weights(
            [*new.items(), ("lm_head.weight", new[EMBEDDING] + 1)], version=1
        )


def test_a_folder_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(WeightsError, match=r"config\.json: model_type is 'llama', expected one of 'qwen3_vl'"):
        EmbeddedEngine("text", tmp_path / "other")


def test_a_folder_without_a_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folder / file, tmp_path / file)
    with pytest.raises(WeightsError, match=r"no tokenizer; expected tokenizer\.json"):
        EmbeddedEngine("text", tmp_path)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        EmbeddedEngine("text", tmp_path / "nowhere")
