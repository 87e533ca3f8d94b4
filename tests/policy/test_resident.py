"""Teachers in the student's trainer say what the engine with the same weights says, however the model is divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gang
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_policy import SIZE, base_folder, gradients, make_samples, new_policy, worst_difference

from copd_megatron.data.mini.model import build
from copd_megatron.errors import WeightsError
from copd_megatron.objectives.branch_loss import branch_loss
from copd_megatron.objectives.settings import LossSettings
from copd_megatron.policy import layout as layouts
from copd_megatron.policy.batching import NATIVE, Sample
from copd_megatron.policy.layout import Layout
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.weights.hf import HfFolder

TEMPERATURE, VERSION = 0.8, 3
EVERYTHING = 64
"""Top-k of the updates: the whole vocabulary, so that losses on it are those on top-k and tail."""
LIKE = {"sampled": "sampled", "topk_forward": "topk_forward", "full_forward": "topk_forward"}
"""Losses of resident teachers, and what is the same with an engine."""

NAMES = ("one", "other")
LAYOUTS = {
    "tensor": Layout(world=2, tp=2, sequence_parallel=True),
    "pipeline": Layout(world=2, pp=2),
    "context": Layout(world=2, cp=2),
    "data": Layout(world=2),
}
WITH_EXPERTS = {
    "experts": Layout(world=2, ep=2),
    "interleaved": Layout(world=2, pp=2, vpp=2),
}
"""Of a model with experts, which are exchanged between replicas of which one has samples of only one teacher."""
STATISTICS = ("loss", "grad_norm", "entropy", "opd/kl", "opd/delta", "rl/surrogate",
              *(f"{name}/{teacher}" for name in ("overlap", "symkl", "kl_forward") for teacher in (0, 1)))  # fmt: skip


def folders(root: Path) -> dict[str, Path]:
    """The student's base, and its teachers' weights."""
    return {name: root / name for name in ("student", *NAMES)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resident")
    for seed, folder in enumerate(folders(root).values()):
        base_folder(folder, seed)
    return root


def samples_of(root: Path) -> list[Sample]:
    """Native samples and those of both teachers, with and without pictures, in one order."""
    found = []
    for number, sample in enumerate(make_samples(root / "student", prompts=12, group=2, teachers=True)):
        source = sample.source if sample.source == NATIVE else number // 8 % 2
        found.append(replace(sample, source=source, rollout=replace(sample.rollout, teacher=None)))
    return found


def scored(root: Path, samples: Sequence[Sample], top_k: int) -> list[Sample]:
    """The samples as the teachers' engines score them."""
    result = list(samples)
    for index, name in enumerate(NAMES):
        engine = EmbeddedEngine(name, root / name)
        own = [number for number, sample in enumerate(samples) if sample.source == index]
        scores = engine.score([samples[number].rollout for number in own], top_k, TEMPERATURE)
        for number, score in zip(own, scores, strict=True):
            result[number] = replace(result[number], rollout=replace(result[number].rollout, teacher=score))
    return result


def published(root: Path, asked: list[tuple[str, int]], name: str, version: int) -> Any:
    asked.append((name, version))
    if version != VERSION:
        raise WeightsError(f"{name} has not published version {version}")
    return nullcontext(Weights(root / name))


class Weights(dict[str, torch.Tensor]):
    """A teacher's weights by Hugging Face name."""

    def __init__(self, folder: Path) -> None:
        super().__init__(HfFolder(folder).tensors())


def new_residents(root: Path, layout: Layout, asked: list[tuple[str, int]], top_k: int, whole: bool = False):
    from copd_megatron.policy.qwen3_vl import build_model
    from copd_megatron.policy.resident import ResidentTeachers

    model = build_model(root / "student", layout, "fp32")
    return ResidentTeachers(model, NAMES, partial(published, root, asked), top_k, TEMPERATURE, whole)


def settings(loss: str) -> LossSettings:
    return LossSettings(opd_loss=loss, temperature=TEMPERATURE, overlap_k=4, teachers=2)


def update(root: Path, layout: Layout, loss: str, resident: bool) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Statistics and gradients of one update; the layout has been initialised. Replicas have unequal parts."""
    policy = new_policy(root / "student", layout, max_tokens=60, clip_grad=0)
    samples = samples_of(root)
    mine = samples if layout.dp == 1 else (samples[:6], samples[6:])[layouts.data_parallel_rank()]
    teach = None
    if resident:
        residents = new_residents(root, layout, [], EVERYTHING, whole=loss.startswith("full"))
        teach = partial(residents.teach, version=VERSION)
    else:
        mine = scored(root, mine, EVERYTHING)
    metrics = policy.update(mine, partial(branch_loss, settings=settings(loss)), teach=teach)
    return metrics, gradients(policy) if len(policy.chunks) == 1 else {}


def updates_in_gang(root: Path, out: Path, name: str) -> Mapping[str, dict[str, float]]:
    layout = (LAYOUTS | WITH_EXPERTS)[name]
    layouts.initialize(layout)
    try:
        results = {}
        for loss in LIKE:
            results[loss], gradient = update(root, layout, loss, resident=True)
            if torch.distributed.get_rank() == 0:
                save_file({key: value.contiguous() for key, value in gradient.items()}, out / f"{loss}.gradients")
        return results
    finally:
        layouts.shutdown()


@pytest.fixture(scope="module")
def by_engine(root: Path) -> dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]]:
    """What a single process makes of the engines' scores."""
    return updates_by_engine(root)


def updates_by_engine(root: Path) -> dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]]:
    layouts.initialize(Layout())
    try:
        return {loss: update(root, Layout(), loss, resident=False) for loss in set(LIKE.values())}
    finally:
        layouts.shutdown()


def same(found: Mapping[str, float], expected: Mapping[str, float], tolerance: float = 1e-4) -> None:
    for name in STATISTICS:
        assert found[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name


def test_a_resident_teacher_says_what_its_engine_says(root: Path) -> None:
    layouts.initialize(Layout())
    try:
        asked: list[tuple[str, int]] = []
        policy, residents = new_policy(root / "student", max_tokens=60), new_residents(root, Layout(), asked, 8)
        samples = samples_of(root)
        packed = policy._pack(samples, {NATIVE: 1, 0: 1, 1: 1}, by_source=True)
        taught = residents.teach(packed.microbatches, VERSION)
        expected = scored(root, samples, 8)
        seen = dict.fromkeys((NATIVE, 0, 1), 0)
        for batch, order in zip(taught, packed.order, strict=True):
            source = int(batch.signals.source[0])
            seen[source] += any(samples[index].rollout.prompt.media is not None for index in order)
            assert (batch.lesson is None) == (source == NATIVE)
            if batch.lesson is None:
                continue
            scores = [expected[index].rollout.teacher for index in order]
            signals = batch.taught().signals
            for name in ("logprobs", "top_ids", "top_logprobs"):
                wanted = torch.cat([getattr(score, name) for score in scores])
                torch.testing.assert_close(getattr(signals, f"teacher_{name}"), wanted, rtol=0, atol=1e-4)
            known = signals.teacher_top_logprobs.double().exp().sum(-1)
            torch.testing.assert_close(signals.teacher_tail.double().exp(), 1 - known, rtol=0, atol=1e-6)
            assert signals.teacher_logits is None
        assert all(seen.values()), "pictures of every source"
        assert asked == [("one", VERSION), ("other", VERSION)]
    finally:
        layouts.shutdown()


def test_weights_are_read_once_per_version_and_never_of_another_one(root: Path) -> None:
    layouts.initialize(Layout())
    try:
        asked: list[tuple[str, int]] = []
        residents = new_residents(root, Layout(), asked, 8)
        residents._names = ("one",)
        residents.teach([], VERSION)
        residents.teach([], VERSION)
        assert asked == [("one", VERSION)]
        with pytest.raises(WeightsError, match="one has not published version 4"):
            residents.teach([], 4)
    finally:
        layouts.shutdown()


@pytest.mark.parametrize("loss", LIKE)
def test_an_update_with_resident_teachers_is_that_with_their_engines(root: Path, by_engine, loss: str) -> None:
    layouts.initialize(Layout())
    try:
        metrics, gradient = update(root, Layout(), loss, resident=True)
    finally:
        layouts.shutdown()
    expected, expected_gradient = by_engine[LIKE[loss]]
    assert expected["opd/kl"] > 0.01
    same(metrics, expected)
    assert worst_difference(gradient, expected_gradient) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_divided_teacher_says_the_same(root: Path, by_engine, tmp_path: Path, name: str) -> None:
    for results in gang.run(2, updates_in_gang, root, tmp_path, name):
        for loss, like in LIKE.items():
            same(results[loss], by_engine[like][0])
    for loss, like in LIKE.items():
        assert worst_difference(load_file(tmp_path / f"{loss}.gradients"), by_engine[like][1]) < 1e-3


@pytest.mark.slow
def test_teachers_with_experts_and_in_interleaved_stages_say_the_same(tmp_path: Path) -> None:
    for seed, folder in enumerate(folders(tmp_path).values()):
        build(folder, seed, replace(SIZE, layers=4, experts=4))
    expected = updates_by_engine(tmp_path)
    assert expected["sampled"][0]["opd/kl"] > 0.01
    for name in WITH_EXPERTS:
        for results in gang.run(2, updates_in_gang, tmp_path, tmp_path, name):
            for loss, like in LIKE.items():
                same(results[loss], expected[like][0])
