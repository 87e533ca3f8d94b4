"""Distances between two real models, against their whole distributions."""

from __future__ import annotations

import pytest
import torch

from copd_kernels import reference
from copd_megatron.config import RunConfig
from copd_megatron.data.capability import first, open_capability
from copd_megatron.data.mini.model import build
from copd_megatron.data.prompts import PromptBuilder, load_processor, stop_token_ids
from copd_megatron.pilot.distances import Asking, seen_by_student, seen_by_teacher
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.types import Sampling

TEMPERATURE = 0.8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two untrained models in one folder."""
    out = tmp_path_factory.mktemp("mini")
    for seed in (0, 1):
        build(out / str(seed), seed=seed)
    return out


@pytest.fixture(scope="module")
def engines(folder):
    return [EmbeddedEngine(name, folder / str(seed)) for seed, name in enumerate(("student", "teacher"))]


@pytest.fixture(scope="module")
def asking(folder):
    config = RunConfig(base="base", branches=({"name": "image", "data": {"mini": {"modality": "image"}}},))
    source = open_capability(config.branches[0], config.data, 0, 1).validation
    builder = PromptBuilder(load_processor(folder / "0"), 256)
    prompts, _ = builder.build_many(first(source, 7), "image")
    sampling = Sampling(6, stop_token_ids(folder / "0", builder.tokenizer), TEMPERATURE)
    return Asking(prompts, sampling, seed=3, top_k=64)


def distributions(engine, rollouts):
    """Log-probabilities [R, V] of each rollout, from the engine's whole top-k."""
    return [
        torch.full((len(score.top_ids), score.top_ids.shape[1]), torch.nan).scatter(
            1, score.top_ids, score.top_logprobs
        )
        for score in engine.score(rollouts, 1000, TEMPERATURE)
    ]


def test_overlap_and_symmetric_kl_are_those_of_the_students_states(engines, asking):
    student, teacher = engines
    found = seen_by_student(student, teacher, (1, 5), asking)
    rollouts = student.generate(asking.prompts, asking.sampling, asking.seed)
    assert list(found) == ["overlap@1", "overlap@5", "symkl"]
    for place, (own, other) in enumerate(
        zip(distributions(student, rollouts), distributions(teacher, rollouts), strict=True)
    ):
        for k in (1, 5):
            assert found[f"overlap@{k}"][place] == (
                pytest.approx(float(reference.topk_overlap(own, other, k).sum()), abs=1e-5), len(own))  # fmt: skip
        both = reference.token_kl(own, other, "reverse") + reference.token_kl(own, other, "forward")
        assert found["symkl"][place][0] == pytest.approx(float(both.sum()), abs=1e-3)
    assert 0 < sum(total for total, _ in found["overlap@5"]) < sum(count for _, count in found["overlap@5"])


def test_kl_and_support_are_those_of_the_teachers_rollouts(engines, asking):
    student, teacher = engines
    found = seen_by_teacher(student, teacher, asking)
    rollouts = teacher.generate(asking.prompts, asking.sampling, asking.seed)
    for place, (rollout, own, other) in enumerate(
        zip(rollouts, distributions(student, rollouts), distributions(teacher, rollouts), strict=True)
    ):
        assert found["kl"][place] == (
            pytest.approx(float(reference.token_kl(own, other, "forward").sum()), abs=1e-3), len(own))  # fmt: skip
        ids = torch.tensor(rollout.token_ids)[:, None]
        ratio = float((own.gather(1, ids) - other.gather(1, ids)).sum())
        assert found["low_support"][place] == (float(ratio < -5), 1.0)
    assert all(total > 0 for total, _ in found["kl"])


def test_support_is_lost_where_the_student_hardly_says_what_the_teacher_said(engines, asking, monkeypatch):
    monkeypatch.setattr("copd_megatron.pilot.distances.LOW_SUPPORT", 100.0)
    assert set(seen_by_teacher(*engines, asking)["low_support"]) == {(1.0, 1.0)}


def test_a_top_k_below_the_vocabulary_never_exceeds_the_whole(engines, asking):
    few = Asking(asking.prompts, asking.sampling, asking.seed, top_k=8)
    for name in ("symkl", "overlap@5"):
        some, every = (seen_by_student(*engines, (5,), how)[name] for how in (few, asking))
        for part, whole in zip(some, every, strict=True):
            assert part[1] == whole[1]
            assert part[0] == pytest.approx(whole[0], abs=1e-6) if name == "overlap@5" else part[0] < whole[0] + 1e-4


def test_a_model_is_at_no_distance_from_itself(engines, asking):
    teacher = engines[1]
    found = seen_by_student(teacher, teacher, (1, 5), asking) | seen_by_teacher(teacher, teacher, asking)
    for name, pairs in found.items():
        for total, count in pairs:
            assert total == pytest.approx(count if name.startswith("overlap") else 0, abs=1e-4), name
