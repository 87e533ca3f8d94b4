"""What a network and a failing server can do to an answer: nothing is lost, and nothing is silently wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import FaultyProxy
from servers import KEY, RunningServer
from tiny_models import END

from copd_megatron.errors import CopdError
from copd_megatron.rollout.engine import EngineLost
from copd_megatron.rollout.sglang import wire
from copd_megatron.rollout.sglang.client import Limits
from copd_megatron.rollout.sglang.endpoints import Endpoints
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.rollout.sglang.shared_memory import SharedMemory
from copd_megatron.rollout.types import Prompt, Rollout, Sampling
from copd_megatron.weights.hf import HfFolder

SAMPLING = Sampling(max_new_tokens=8, stop_token_ids=(END,), n=2)
FAULTS = ["500", "reset", "cut", "garbage", "short", "nan", "other"]


@pytest.fixture(scope="module")
def proxy(server: RunningServer) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server.url)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def engine(proxy: FaultyProxy, folder: Path) -> Iterator[SGLangEngine]:
    endpoints = Endpoints("text", "test", (proxy.url,), KEY)
    engine = SGLangEngine("text", folder, endpoints, SharedMemory(1 << 20), Limits(request_seconds=5.0), attempts=4)
    engine.update_weights(HfFolder(folder).tensors(), version=0)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def expected(engine: SGLangEngine, prompts: list[Prompt]) -> list[Rollout]:
    return engine.generate(prompts, SAMPLING, seed=2)


@pytest.mark.parametrize("fault", [*FAULTS, "hang"])
def test_a_spoiled_sample_is_asked_for_again(
    proxy: FaultyProxy, engine: SGLangEngine, prompts: list[Prompt], expected: list[Rollout], fault: str
) -> None:
    engine.counts()
    proxy.plan = [fault, fault]
    rollouts = engine.generate(prompts, SAMPLING, seed=2)
    assert not proxy.plan
    assert [rollout.token_ids for rollout in rollouts] == [rollout.token_ids for rollout in expected]
    assert engine.counts()["retried"] == 2


@pytest.mark.parametrize("fault", [*FAULTS, "hang"])
def test_a_spoiled_score_is_asked_for_again(
    proxy: FaultyProxy, engine: SGLangEngine, expected: list[Rollout], fault: str
) -> None:
    before = engine.score(expected, 3, 1.0)
    engine.counts()
    proxy.plan = [fault]
    after = engine.score(expected, 3, 1.0)
    assert not proxy.plan
    for one, other in zip(before, after, strict=True):
        assert one.logprobs.allclose(other.logprobs, atol=1e-5)
        assert one.top_ids.shape == other.top_ids.shape
    assert engine.counts()["retried"] == 1


def test_a_slow_server_is_waited_for_and_a_silent_one_is_lost(
    proxy: FaultyProxy, engine: SGLangEngine, folder: Path, prompts: list[Prompt]
) -> None:
    endpoints = Endpoints("text", "test", (proxy.url,), KEY)
    patient = SGLangEngine("text", folder, endpoints, limits=Limits(request_seconds=600.0, hang_seconds=3.0))
    patient.follow(engine.version)
    proxy.plan = ["slow"]
    assert len(patient.generate(prompts, SAMPLING, seed=2)) == len(prompts) * SAMPLING.n
    assert not proxy.plan
    assert patient.counts()["retried"] == 0
    assert patient.newly_hung() == set()
    proxy.silent = True
    try:
        began = time.monotonic()
        with pytest.raises(EngineLost, match="silent for 3 s, and then unhealthy"):
            patient.generate(prompts, SAMPLING, seed=2)
        assert time.monotonic() - began < 60
    finally:
        proxy.silent = False
    assert patient.newly_hung() == {proxy.url}
    assert patient.newly_hung() == set()
    patient.close()


def test_a_server_that_never_makes_sense_is_given_up_with_its_words(
    proxy: FaultyProxy, engine: SGLangEngine, prompts: list[Prompt]
) -> None:
    proxy.plan = ["nan"] * 1000
    with pytest.raises(CopdError, match=r"4 answers in a row could not be used.*is nan"):
        engine.generate(prompts[:1], SAMPLING, seed=2)
    proxy.plan = []


def test_a_teacher_that_saw_no_image_is_never_believed(
    proxy: FaultyProxy, engine: SGLangEngine, expected: list[Rollout]
) -> None:
    with_image = [rollout for rollout in expected if rollout.prompt.media is not None][:1]
    proxy.plan = ["deaf"]
    with pytest.raises(CopdError, match=r"the server saw 0 image tokens, the student \d+"):
        engine.score(with_image, 1, 1.0)
    assert not proxy.plan


def test_a_server_that_was_not_shown_the_video_is_refused(
    engine: SGLangEngine, videos: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = wire.media_fields

    def blind(*arguments: Any) -> dict[str, Any]:
        return {name: value for name, value in shown(*arguments).items() if name != "video_data"}

    monkeypatch.setattr(wire, "media_fields", blind)
    rollout = Rollout(videos[1], (9, END), torch.zeros(2), "stop", 0, "")
    with pytest.raises(CopdError, match="saw 0 video tokens, the student 12"):
        engine.score([rollout], 1, 1.0)
    with pytest.raises(CopdError, match="saw 0 video tokens, the student 6"):
        engine.generate(videos[:1], SAMPLING, seed=0)


@pytest.mark.parametrize("path", ["/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"])
@pytest.mark.parametrize("fault", ["500", "reset"])
def test_a_hand_over_that_fails_is_no_hand_over(
    proxy: FaultyProxy, engine: SGLangEngine, folder: Path, prompts: list[Prompt], path: str, fault: str
) -> None:
    version = max(engine.version, 0) + 1
    proxy.path, proxy.plan = path, [fault]
    with pytest.raises(EngineLost, match="the hand-over of weights failed"):
        engine.update_weights(HfFolder(folder).tensors(), version)
    assert not proxy.plan
    proxy.path = "/generate"
    assert engine.version == -1
    with pytest.raises(EngineLost):
        engine.generate(prompts[:1], SAMPLING, seed=2)
    engine.update_weights(HfFolder(folder).tensors(), version)
    assert engine.generate(prompts[:1], SAMPLING, seed=2)[0].policy_version == version
