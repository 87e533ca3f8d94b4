"""The supervised cold start: what a batch holds, what it teaches, and any number of ranks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_policy import base_folder, worst_difference

from copd_megatron.data.mini import MiniSource, MiniTask
from copd_megatron.data.prompts import PromptBuilder, load_processor
from copd_megatron.demonstrations import DemonstrationBatches
from copd_megatron.errors import DataError, WeightsError
from copd_megatron.policy.batching import Sample
from copd_megatron.sft import SftSettings, launch

MINI = ({"name": "text", "mini": "text"}, {"name": "image", "mini": "image"})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("sft") / "base")


def settings(base: Path, out: Path, **changes: Any) -> SftSettings:
    return SftSettings(**{
        "model": str(base), "out": str(out), "data": MINI, "steps": 12, "batch": 8, "max_prompt_tokens": 64,
        "optimizer": {"lr": 1e-2, "warmup_steps": 3}, **changes,
    })  # fmt: skip


def batches(base: Path, rank: int = 0, replicas: int = 1) -> DemonstrationBatches:
    sources = {
        modality: MiniSource(MiniTask(), modality, "cold_start", seed=0, size=40) for modality in ("text", "image")
    }
    return DemonstrationBatches(sources, PromptBuilder(load_processor(base), 64), 8, 0, rank, replicas)


def uids(samples: list[Sample]) -> Counter[str]:
    return Counter(sample.rollout.prompt.uid for sample in samples)


def test_batch_holds_as_many_demonstrations_of_each_capability(base: Path) -> None:
    samples = batches(base).draw()
    assert Counter(sample.rollout.prompt.capability for sample in samples) == {"text": 8, "image": 8}
    tokenizer = load_processor(base).tokenizer
    for sample in samples:
        rollout = sample.rollout
        assert tokenizer.decode(rollout.token_ids) == rollout.text + "<|im_end|>"
        assert ">" in rollout.text
        assert len(rollout.logprobs) == len(rollout.token_ids)
        assert (rollout.prompt.media is None) == (rollout.prompt.capability == "text")


def test_ranks_take_disjoint_slices_that_make_up_the_batch(base: Path) -> None:
    whole, *parts = batches(base), batches(base, 0, 2), batches(base, 1, 2)
    for _ in range(3):
        shares = [uids(part.draw()) for part in parts]
        assert not shares[0].keys() & shares[1].keys()
        assert shares[0] + shares[1] == uids(whole.draw())


def test_cold_start_teaches_and_leaves_a_model_and_its_metrics(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    out = tmp_path / "model"
    launch(settings(base, out))
    lines = [json.loads(line) for line in (tmp_path / "model.metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["sft/loss"] < 0.7 * lines[0]["sft/loss"]
    assert lines[0]["lr"] == pytest.approx(1e-2 / 3, rel=1e-5)
    assert lines[-1]["lr"] == pytest.approx(1e-2 * (1 - 0.9 * 11 / 12), rel=1e-5)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert worst_difference(after, before) > 0.01
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])
    assert load_processor(out).tokenizer.decode([1]) == load_processor(base).tokenizer.decode([1])


def test_same_seed_makes_the_same_model_and_a_rerun_replaces_it(base: Path, tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        launch(settings(base, tmp_path / "model", steps=2, seed=seed))
        found.append((tmp_path / "model" / "model.safetensors").read_bytes())
        assert len((tmp_path / "model.metrics.jsonl").read_text().splitlines()) == 2
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_own_data_is_learned_from_and_demonstrations_must_be_there(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"sum {number}", "shown": "5>5"} for number in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(data), "verifier": "exact", "fields": {"answer": None, "response": "shown"}}
    own = {"data": [{"name": "sums", "source": source}], "steps": 2}
    launch(settings(base, tmp_path / "model", **own))
    source["fields"] = {"answer": "shown"}
    with pytest.raises(
        DataError, match=r"there is no demonstration to learn from; name its field in `fields.response`"
    ):
        launch(settings(base, tmp_path / "other", **own))
    assert not (tmp_path / "other").exists()


def test_wrong_settings_are_refused_before_anything_starts(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="batch = 8 cannot be shared out evenly among world = 3"):
        settings(base, tmp_path / "model", world=3)
    with pytest.raises(ValidationError, match="give either `mini` or `source`"):
        settings(base, tmp_path / "model", data=[{"name": "text"}])
    with pytest.raises(ValidationError, match="names must differ"):
        settings(base, tmp_path / "model", data=[MINI[0], MINI[0]])
    with pytest.raises(WeightsError, match="nowhere"):
        launch(settings(tmp_path / "nowhere", tmp_path / "model"))


@pytest.mark.slow
def test_two_processes_make_the_model_that_one_makes(base: Path, tmp_path: Path) -> None:
    gentle = {"steps": 4, "optimizer": {"lr": 1e-3, "eps": 1e-3}}
    launch(settings(base, tmp_path / "one", **gentle))
    launch(settings(base, tmp_path / "two", world=2, **gentle))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert worst_difference(two, one) < 1e-3
    lines = [json.loads((tmp_path / f"{name}.metrics.jsonl").read_text().splitlines()[-1]) for name in ("one", "two")]
    assert lines[1]["sft/loss"] == pytest.approx(lines[0]["sft/loss"], rel=1e-3)
    assert lines[1]["response_tokens"] == lines[0]["response_tokens"]
