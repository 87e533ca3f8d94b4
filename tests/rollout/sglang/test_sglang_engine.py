"""The engine on a real server, beside transformers' own forward."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_inputs import plain_inputs
from servers import KEY, RunningServer
from tiny_models import END, IMAGE, TEXT, VIDEO, build_folder
from xxhash import xxh3_128_hexdigest

from copd_megatron.errors import CopdError, DataError
from copd_megatron.policy import layout
from copd_megatron.policy.batching import Sample
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.policy.trainer import Policy
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.engine import EngineLost
from copd_megatron.rollout.sglang import background, wire
from copd_megatron.rollout.sglang.broadcast import Broadcast
from copd_megatron.rollout.sglang.client import EngineRefused, Limits, Server
from copd_megatron.rollout.sglang.endpoints import Endpoints
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.rollout.sglang.files import Files
from copd_megatron.rollout.sglang.shared_memory import SharedMemory
from copd_megatron.rollout.types import Prompt, Rollout, Sampling
from copd_megatron.weights.hf import HfFolder

GREEDY = Sampling(max_new_tokens=12, stop_token_ids=(END,), temperature=0.0)
SAMPLED = replace(GREEDY, temperature=1.0, n=3)
SAME = 1e-5
"""Bound of |δ| where teacher and student have the same weights, in float32 (docs/sglang.md)."""
VOCABULARY = int(TEXT["vocab_size"])


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    return build_folder(tmp_path_factory.mktemp("other_model"), tied=False, seed=5)


@pytest.fixture(scope="module")
def engine(server: RunningServer, folder: Path) -> Iterator[SGLangEngine]:
    """The branch's own engine, with the weights of `folder` as version 0. Small buckets: several are needed."""
    engine = SGLangEngine("text", folder, server.endpoints("text"), SharedMemory(1 << 16))
    engine.update_weights(HfFolder(folder).tensors(), version=0)
    yield engine
    engine.close()


def reference(folder: Path) -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()


def logits(model: Any, prompt: Prompt, response: Sequence[int]) -> torch.Tensor:
    """Logits [R, V] at every token of the response, by a plain forward."""
    inputs = plain_inputs(model, prompt.token_ids, prompt.media, response)
    model.model.rope_deltas = None
    with torch.no_grad():
        return model(**inputs).logits[0, len(prompt.token_ids) - 1 : -1]


def greedy(model: Any, prompt: Prompt) -> list[int]:
    """The response, or as much of it as transformers can go on from: behind a sampled image token it cannot."""
    response: list[int] = []
    while len(response) < GREEDY.max_new_tokens and not {END, IMAGE, VIDEO} & set(response):
        response.append(int(logits(model, prompt, [*response, 0])[-1].argmax()))
    return response


def assert_greedy(engine: SGLangEngine, model: Any, prompts: Sequence[Prompt]) -> None:
    compared = 0
    for prompt, rollout in zip(prompts, engine.generate(prompts, GREEDY, seed=0), strict=True):
        response = greedy(model, prompt)
        assert list(rollout.token_ids)[: len(response)] == response
        expected = torch.log_softmax(logits(model, prompt, [*response[:-1], 0]), dim=-1)
        of_tokens = expected.gather(-1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[: len(response)], of_tokens, rtol=0, atol=1e-4)
        compared += len(response)
        assert rollout.finish == ("stop" if rollout.token_ids[-1] == END else "length")
        assert rollout.policy_version == engine.version
    assert compared > len(prompts) * GREEDY.max_new_tokens / 3


def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    engine: SGLangEngine, folder: Path, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    assert_greedy(engine, reference(folder), [*prompts, *videos])


def test_scores_are_those_of_transformers(
    engine: SGLangEngine, folder: Path, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    model = reference(folder)
    rollouts = [
        Rollout(
            prompt,
            tuple(6 + (7 * place + 5 * step) % (VOCABULARY - 6) for step in range(1 + place)),
            torch.zeros(1),
            "stop",
            0,
            "",
        )
        for place, prompt in enumerate([*prompts, *videos, *prompts, *videos])
    ]
    for rollout, score in zip(rollouts, engine.score(rollouts, 6, 1.0), strict=True):
        expected = torch.log_softmax(logits(model, rollout.prompt, rollout.token_ids), dim=-1)
        of_tokens = expected.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(score.logprobs, of_tokens, rtol=0, atol=1e-4)
        values, ids = expected.sort(dim=-1, descending=True, stable=True)
        torch.testing.assert_close(score.top_logprobs, values[:, :6], rtol=0, atol=1e-4)
        clear = (values[:, :6] - values[:, 1:7]) > 1e-5
        clear[:, 1:] &= clear[:, :-1].clone()
        assert clear.float().mean() > 0.9
        assert torch.equal(score.top_ids[clear], ids[:, :6][clear])


def test_every_token_can_be_scored_behind_an_image_and_a_video(
    engine: SGLangEngine, folder: Path, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    """Also those that stand for images: a policy may sample them, and then they are tokens like any other. (A plain
    forward of transformers refuses them; the embedded engine is held to it for all others.)"""
    rollouts = [
        Rollout(prompt, (token, 7), torch.zeros(2), "length", 0, "")
        for prompt in (prompts[1], videos[1])
        for token in range(VOCABULARY)
    ]
    embedded = EmbeddedEngine("text", folder).score(rollouts, 0, 1.0)
    for ours, theirs in zip(engine.score(rollouts, 0, 1.0), embedded, strict=True):
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-4)


def test_the_compact_form_holds_what_the_nested_one_does(server: RunningServer, engine: SGLangEngine) -> None:
    prompt = Prompt("p", "text", tuple(range(6, 30)), "", "exact", "")
    rollout = Rollout(prompt, tuple(range(30, 45)), torch.zeros(15), "length", 0, "")
    tokens = wire.Tokens(VOCABULARY, None)
    body = wire.scoring_request(rollout, {}, 10, tokens)
    compact = post(server, "/generate", body)
    nested = post(server, "/generate", {key: value for key, value in body.items() if "flat" not in key})
    scored = wire.read_scores(compact, rollout, 10, "test/text/0", tokens)
    rows = nested["meta_info"]["input_top_logprobs"][1:]
    assert scored.top_ids.tolist() == [[entry[1] for entry in row] for row in rows]
    values = torch.tensor([[entry[0] for entry in row] for row in rows])
    torch.testing.assert_close(scored.top_logprobs, values, rtol=0, atol=0)


def test_rollouts_depend_on_their_seed_alone(engine: SGLangEngine, prompts: list[Prompt]) -> None:
    first = engine.generate(prompts, SAMPLED, seed=3)
    told: dict[int, Rollout] = {}
    again = engine.generate(prompts, SAMPLED, seed=3, finished=told.__setitem__)
    assert [rollout.token_ids for rollout in first] == [rollout.token_ids for rollout in again]
    assert [told[place].token_ids for place in range(len(again))] == [rollout.token_ids for rollout in again]
    other = engine.generate(prompts, SAMPLED, seed=4)
    assert [rollout.token_ids for rollout in first] != [rollout.token_ids for rollout in other]
    assert len({rollout.token_ids for rollout in first[:3]}) > 1
    assert [rollout.prompt.uid for rollout in first] == [prompt.uid for prompt in prompts for _ in range(3)]


def test_without_stop_tokens_nothing_ends_a_response_early(engine: SGLangEngine, prompts: list[Prompt]) -> None:
    rollouts = engine.generate(prompts[:1], replace(SAMPLED, max_new_tokens=60, stop_token_ids=(), n=16), seed=4)
    assert {(len(rollout.token_ids), rollout.finish) for rollout in rollouts} == {(60, "length")}
    assert any(END in rollout.token_ids for rollout in rollouts), "no response has passed the model's own end"


def test_new_weights_are_those_that_answer(
    engine: SGLangEngine, folder: Path, other_folder: Path, prompts: list[Prompt]
) -> None:
    engine.update_weights(HfFolder(other_folder).tensors(), version=1)
    assert_greedy(engine, reference(other_folder), prompts)
    engine.update_weights(HfFolder(folder).tensors(), version=2)
    assert_greedy(engine, reference(folder), prompts)


def test_a_servers_checksums_are_of_the_bytes_it_was_given(
    server: RunningServer, engine: SGLangEngine, folder: Path
) -> None:
    asked = Server(server.url, KEY, Limits())
    ranks = background.run(asked.post("/weights_checker", {"action": "checksum"}))["ranks"]
    background.run(asked.close())
    held = {name: value for rank in ranks for name, value in rank["checksums"].items()}
    given = {name: xxh3_128_hexdigest(tensor.numpy().tobytes()) for name, tensor in HfFolder(folder).tensors()}
    # sglang joins the first five, and pads the last two.
    joined = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    alone = {value for name, value in given.items() if not any(part in name for part in joined)}
    assert len(alone) > 20
    assert alone <= {*held.values()}


def test_a_peer_follows_versions_and_refuses_others(
    server: RunningServer, engine: SGLangEngine, folder: Path, prompts: list[Prompt]
) -> None:
    peer = SGLangEngine("text", folder, server.endpoints("text"))
    rollouts = engine.generate(prompts[:1], GREEDY, seed=0)
    peer.follow(engine.version)
    assert peer.score(rollouts, 2, 1.0)[0].version == engine.version
    peer.follow(engine.version + 1)
    with pytest.raises(EngineLost, match="which are not those it was given last"):
        peer.score(rollouts, 2, 1.0)
    with pytest.raises(RuntimeError, match="not for this one to change"):
        peer.update_weights(HfFolder(folder).tensors(), version=9)
    peer.close()


def test_servers_that_slept_answer_with_the_next_weights(
    engine: SGLangEngine, folder: Path, prompts: list[Prompt]
) -> None:
    """On a CPU they have nothing to give back, and do as they are told."""
    engine.sleep()
    engine.wake()
    engine.update_weights(HfFolder(folder).tensors(), version=engine.version + 1)
    assert_greedy(engine, reference(folder), prompts[:2])
    assert engine.counts()["lost"] == 0


def test_incomplete_weights_raise_and_are_never_used(engine: SGLangEngine, folder: Path, prompts: list[Prompt]) -> None:
    class Broken(Exception):
        pass

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        for number, pair in enumerate(HfFolder(folder).tensors()):
            if number == 5:
                raise Broken
            yield pair

    before = engine.version
    with pytest.raises(Broken):
        engine.update_weights(half(), version=before + 1)
    assert engine.version == -1
    engine.update_weights(HfFolder(folder).tensors(), version=before + 1)
    assert_greedy(engine, reference(folder), prompts[:2])


def test_nobody_meets_weights_of_two_versions(
    server: RunningServer, engine: SGLangEngine, folder: Path, other_folder: Path
) -> None:
    """Requests run all the time while weights change 50 times: every token's log-probability is that of the version
    which the server names for it."""
    models = [reference(folder), reference(other_folder)]
    weights = [dict(HfFolder(one).tensors()) for one in (folder, other_folder)]
    prompt = Prompt("p", "text", tuple(range(6, 20)), "", "exact", "")
    sampling = replace(SAMPLED, max_new_tokens=60, stop_token_ids=())
    replies: list[Any] = []
    over = threading.Event()

    def read() -> None:
        seed = 0
        while not over.is_set():
            seed += 1
            body = wire.sampling_request(prompt, {}, sampling, seed)
            replies.append(post(server, "/generate", body))

    first = engine.version + 1
    first += first % 2  # even versions have the first weights
    engine.update_weights(weights[0].items(), version=first)
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for version in range(first + 1, first + 51):
            engine.update_weights(weights[version % 2].items(), version=version)
            time.sleep(0.1)  # or the requests would be under way for all the 50
    finally:
        over.set()
        reader.join()
    tokens = crossed = 0
    for reply in replies:
        response = reply["output_ids"]
        both = [torch.log_softmax(logits(model, prompt, response), dim=-1) for model in models]
        spans = reply["meta_info"]["weight_versions"]
        crossed += len(spans) > 1
        for span in spans:
            version = int(span["version"].rsplit("/", 1)[1])
            for place in range(span["start"], span["end"]):
                value, token, _ = reply["meta_info"]["output_token_logprobs"][place]
                assert value == pytest.approx(float(both[version % 2][place, token]), abs=1e-3)
                tokens += 1
    assert len(replies) > 3
    assert tokens == sum(len(reply["output_ids"]) for reply in replies)
    assert crossed > 0, "no request was under way during an update: the test has shown nothing"


def test_bad_input_is_refused_before_it_is_sent(engine: SGLangEngine, prompts: list[Prompt]) -> None:
    with pytest.raises(ValueError, match=r"sample at 1\.0"):
        engine.score([], 1, 0.7)
    with pytest.raises(ValueError, match="top_k is -1"):
        engine.score([], -1, 1.0)
    blind = replace(prompts[1], media=None)
    with pytest.raises(DataError, match="image tokens"):
        engine.generate([blind], GREEDY, seed=0)
    with pytest.raises(DataError, match="vocabulary"):
        engine.score([Rollout(prompts[0], (VOCABULARY,), torch.zeros(1), "stop", 0, "")], 1, 1.0)
    everything = engine.score([Rollout(prompts[0], (9,), torch.zeros(1), "stop", 0, "")], 10**6, 1.0)
    assert everything[0].top_ids.shape == (1, VOCABULARY)


def test_another_key_is_refused_with_advice(server: RunningServer, folder: Path, prompts: list[Prompt]) -> None:
    stranger = SGLangEngine("text", folder, replace(server.endpoints("text"), key="a guess"))
    stranger.follow(0)
    with pytest.raises(EngineRefused, match="another API key"):
        stranger.generate(prompts[:1], GREEDY, seed=0)
    stranger.close()


def test_a_prompt_beyond_the_servers_limits_is_refused_with_its_words(engine: SGLangEngine) -> None:
    long = Prompt("p", "text", (9,) * 600, "", "exact", "")
    with pytest.raises(CopdError, match=r"600|longer|context"):
        engine.generate([long], GREEDY, seed=0)


def test_the_key_is_in_no_log(server: RunningServer, engine: SGLangEngine) -> None:
    assert KEY not in server.log.read_text(errors="replace")
    assert KEY not in repr(server.endpoints("text"))


@pytest.mark.parametrize("way", ["group", "files"])
def test_weights_come_by_other_ways_too(
    way: str, server: RunningServer, folder: Path, other_folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    between = tmp_path / "handover"
    transport = Broadcast(1 << 16, "127.0.0.1") if way == "group" else Files(1 << 16, between)
    engine = SGLangEngine("text", folder, server.endpoints("text", way), transport)
    for version, weights in enumerate([other_folder, folder, other_folder]):
        engine.update_weights(HfFolder(weights).tensors(), version)
        assert_greedy(engine, reference(weights), prompts[:3])
    engine.update_weights(HfFolder(folder).tensors(), version=3)
    assert not between.exists()
    engine.close()


def test_files_of_a_hand_over_that_failed_are_never_read(
    server: RunningServer, folder: Path, other_folder: Path, prompts: list[Prompt], tmp_path: Path
) -> None:
    class Broken(Exception):
        pass

    def half() -> Iterator[tuple[str, torch.Tensor]]:
        yield from list(HfFolder(other_folder).tensors())[:5]
        raise Broken

    between = tmp_path / "handover"
    between.mkdir()
    (between / "model-00099.safetensors").write_text("left by one that was killed")
    engine = SGLangEngine("text", folder, server.endpoints("text", "half"), Files(1 << 16, between))
    with pytest.raises(Broken):
        engine.update_weights(half(), version=0)
    assert not between.exists()
    engine.update_weights(HfFolder(folder).tensors(), version=1)
    assert_greedy(engine, reference(folder), prompts[:2])
    engine.close()


def test_a_teacher_with_the_students_weights_has_nothing_to_teach(
    engine: SGLangEngine, folder: Path, prompts: list[Prompt], videos: list[Prompt]
) -> None:
    """δ = log π_teacher − log π_student, the student being the trainer's policy whose weights were handed over, and
    the sampling engine's log-probabilities beside both."""
    layout.initialize(layout.Layout())
    try:
        policy = Policy(folder, layout.Layout(), OptimizerSettings(lr=1e-3), "fp32", 4096)
        engine.update_weights(policy.named_weights(), version=engine.version + 1)
        rollouts = engine.generate([*prompts, *videos], SAMPLED, seed=6)
        scores = engine.score(rollouts, 0, 1.0)
        student = policy.logprobs([Sample(rollout) for rollout in rollouts])
    finally:
        layout.shutdown()
    for rollout, score, own in zip(rollouts, scores, student, strict=True):
        assert float((score.logprobs - own).abs().max()) < SAME
        assert float((rollout.logprobs - own).abs().max()) < SAME


def test_a_killed_server_costs_nothing_but_time(
    start_server: Callable[..., Any], folder: Path, prompts: list[Prompt]
) -> None:
    with start_server(folder) as server:
        few = Limits(in_flight=4)  # most have not been asked for when the server dies
        engine = SGLangEngine("text", folder, server.endpoints("text"), SharedMemory(1 << 20), few)
        engine.update_weights(HfFolder(folder).tensors(), version=0)
        sampling = replace(SAMPLED, n=24)
        expected = engine.generate(prompts, sampling, seed=1)
        told: list[int] = []

        def kill_after(place: int, rollout: Rollout) -> None:
            told.append(place)
            if len(told) == 5:
                server.kill()

        with pytest.raises(EngineLost):
            engine.generate(prompts, sampling, seed=1, finished=kill_after)
        assert 5 <= len(told) < len(expected)
        with pytest.raises(EngineLost):
            engine.wait(0.5)
        server.restart()
        engine.wait(10.0)
        peer = SGLangEngine("text", folder, server.endpoints("text"))
        peer.follow(0)
        with pytest.raises(EngineLost, match="which are not those it was given last"):
            peer.score(expected[:1], 1, 1.0)
        engine.update_weights(HfFolder(folder).tensors(), version=0)
        again = engine.generate(prompts, sampling, seed=1)
        assert [rollout.token_ids for rollout in again] == [rollout.token_ids for rollout in expected]
        assert engine.counts()["lost"] >= 1
        peer.close()
        engine.close()


def test_without_a_server_the_reason_is_said(folder: Path, prompts: list[Prompt]) -> None:
    nobody = Endpoints("text", "test", ("http://127.0.0.1:9",), None)
    engine = SGLangEngine("text", folder, nobody, SharedMemory(1 << 20))
    taken: list[str] = []

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in HfFolder(folder).tensors():
            taken.append(name)
            yield name, tensor

    with pytest.raises(EngineLost, match=r"127\.0\.0\.1:9"):
        engine.update_weights(weights(), version=0)
    assert len(taken) == len(list(HfFolder(folder).tensors())), "other ranks take part to the end"
    engine.close()


def post(server: RunningServer, path: str, body: dict[str, Any]) -> Any:
    async def ask() -> Any:
        connection = Server(server.url, KEY, Limits())
        try:
            return await connection.post(path, body)
        finally:
            await connection.close()

    return background.run(ask())
