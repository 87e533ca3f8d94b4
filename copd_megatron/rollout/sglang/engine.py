"""A rollout engine on SGLang servers: the branch's own, to sample from and hand weights to, or a peer's, to ask."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.randomness import seed_for
from copd_megatron.rollout.engine import EngineLost
from copd_megatron.rollout.hf_module import open_config, open_tokenizer
from copd_megatron.rollout.positions import MediaTokens
from copd_megatron.rollout.prompt_batch import check_prompt, check_tokens
from copd_megatron.rollout.sampling import check_sampling
from copd_megatron.rollout.sglang import background, wire
from copd_megatron.rollout.sglang.client import EngineRefused, Limits, Server, ServerLost
from copd_megatron.rollout.sglang.endpoints import Endpoints
from copd_megatron.rollout.sglang.pool import Pool
from copd_megatron.rollout.sglang.sync import hand_over
from copd_megatron.rollout.sglang.transport import STEP_SECONDS, Transport
from copd_megatron.rollout.types import Prompt, Rollout, Sampling, TeacherScores


class SGLangEngine:
    """A `RolloutEngine` (rollout/engine.py) on the servers at `endpoints`.

    `model_dir` is the Hugging Face folder that the servers were started from: its tokenizer and its configuration are
    needed here, its weights are not. `version` is -1 until weights are handed over, or until `follow` says which ones
    their owner has handed over.
    """

    def __init__(
        self,
        name: str,
        model_dir: str | os.PathLike[str],
        endpoints: Endpoints,
        transport: Transport | None = None,
        limits: Limits | None = None,
        attempts: int = 4,
    ) -> None:
        self.name = name
        self.version = -1
        self.tokenizer: Any = open_tokenizer(Path(model_dir))
        self._config: Any = open_config(Path(model_dir))
        _check_served(self._config, model_dir)
        self._tokens = wire.Tokens(
            vocabulary=self._config.get_text_config().vocab_size,
            media=MediaTokens.of(self._config),
        )
        self._endpoints = endpoints
        self._transport = transport
        servers = [Server(url, endpoints.key, limits or Limits()) for url in endpoints.urls]
        self._pool = Pool(name, servers, attempts)
        self._kept: tuple[Any, dict[int, Rollout]] = (None, {})

    # ------------------------------------------------------------------ weights

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Hand the Hugging Face named tensors over to every server that can be reached, as the weights of `version`.

        `named` is taken to its end even if no server is left, because other processes may be taking part in it. A
        server that fails is asked no more. Raises EngineLost if all of them have.
        """
        if self._transport is None:
            raise RuntimeError(f"engine {self.name!r} is another branch's; it is not for this one to change")
        self.version = -1
        hand_over(self._pool, named, self._endpoints.label(version), self._transport)
        self.version = version
        self._kept = (None, {})

    def sleep(self) -> None:
        """Have the servers give back their GPU memory; they answer nothing until `wake` and new weights."""
        self._everywhere("/release_memory_occupation")

    def wake(self) -> None:
        """Have the servers take their memory again."""
        self._everywhere("/resume_memory_occupation")

    def _everywhere(self, path: str) -> None:
        """Ask all servers for the same; one that fails is lost."""

        async def one(server: Server) -> None:
            try:
                await server.post(path, None, STEP_SECONDS)
            except (ServerLost, wire.BadReply, EngineRefused) as error:
                self._pool.lose(server, str(error))

        async def all_of_them() -> None:
            await asyncio.gather(*(one(server) for server in self._pool.servers if server.lost is None))

        background.run(all_of_them())

    def follow(self, version: int) -> None:
        """From now on expect the weights of `version`, which the servers' owner has handed over (again)."""
        self.version = version
        for server in self._pool.servers:
            server.lost = None

    def renew(self) -> None:
        """Ask all servers again: their owner has seen to them, or they keep the weights that they start with."""
        self.follow(self.version)

    def lost(self) -> bool:
        """Whether a server is not asked any more."""
        return any(server.lost is not None for server in self._pool.servers)

    def newly_hung(self) -> set[str]:
        """Addresses of the servers that have hung since the last call."""
        found = {server.url for server in self._pool.servers if server.hung}
        for server in self._pool.servers:
            server.hung = False
        return found

    def wait(self, seconds: float, every: bool = False) -> None:
        """Return when a server (or `every` one) answers, which takes it a second. Raises EngineLost after `seconds`."""
        there = background.run(self._pool.reachable(seconds, every))
        if not there or (every and len(there) < len(self._pool.servers)):
            missing = ", ".join(server.url for server in self._pool.servers if server not in there)
            raise EngineLost(self.name, f"no answer from {missing} for {seconds:g} s")

    # ------------------------------------------------------------------ sampling

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, the rollouts of one prompt next to each other, in the prompts' order.

        `finished` is called with the place and the rollout as soon as it is there, in no order, from another thread.
        Where servers sample deterministically a rollout depends on its prompt, its place in the list and `seed`. When
        the servers are lost on the way (EngineLost) what has come is kept, and the same call goes on from there.
        """
        check_sampling(sampling)
        for prompt in prompts:
            check_prompt(prompt, self._config)
        key = (self.version, seed, sampling, tuple(prompt.uid for prompt in prompts))
        kept = self._kept[1] if self._kept[0] == key else {}
        self._kept = (key, kept)
        background.run(self._generate(prompts, sampling, seed, kept, finished or _nothing))
        self._kept = (None, {})
        return [kept[place] for place in range(len(prompts) * sampling.n)]

    async def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        kept: dict[int, Rollout],
        finished: Callable[[int, Rollout], None],
    ) -> None:
        label = self._endpoints.label(self.version)
        media = [self.media(prompt) for prompt in prompts]

        async def one(place: int) -> None:
            number, sample = divmod(place, sampling.n)
            prompt = prompts[number]
            body = wire.sampling_request(prompt, media[number], sampling, seed_for(seed, number, sample))

            def read(reply: Any) -> wire.Sampled:
                return wire.read_sample(reply, prompt, sampling, label, self._tokens)

            sampled = await self._pool.ask(body, read, affinity=seed_for(0, prompt.uid))
            kept[place] = self._rollout(prompt, sampled)
            finished(place, kept[place])

        for place, rollout in kept.items():
            finished(place, rollout)
        await _all(one(place) for place in range(len(prompts) * sampling.n) if place not in kept)

    def _rollout(self, prompt: Prompt, sampled: wire.Sampled) -> Rollout:
        body = sampled.token_ids[:-1] if sampled.finish == "stop" else sampled.token_ids
        return Rollout(
            prompt=prompt,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            finish=sampled.finish,
            policy_version=self.version,
            text=self.tokenizer.decode(body, skip_special_tokens=True),
        )

    # ------------------------------------------------------------------ scoring

    def score(self, rollouts: Sequence[Rollout], top_k: int, temperature: float) -> list[TeacherScores]:
        """Log-probabilities of the rollouts' own tokens and of the `top_k` likeliest, one result per rollout.

        A `top_k` above the vocabulary's size V means all of it. Raises ValueError for another `temperature` than 1:
        servers give the log-probabilities of given tokens at 1 only.
        """
        scoring = self.begin_scoring(top_k, temperature)
        for place, rollout in enumerate(rollouts):
            scoring.add(place, rollout)
        return scoring.results()

    def begin_scoring(self, top_k: int, temperature: float) -> Scoring:
        """Scores of rollouts that are added one by one, each asked for at once."""
        if top_k < 0:
            raise ValueError(f"top_k is {top_k}, expected 0 or more")
        if temperature != 1.0:
            raise ValueError(f"temperature is {temperature}; SGLang scores given tokens at 1.0 only: sample at 1.0")
        return Scoring(self, top_k)

    async def ask_score(self, rollout: Rollout, media: dict[str, Any], top_k: int) -> TeacherScores:
        """The servers' scores of one rollout; `media` are its prompt's `wire.media_fields`."""
        label = self._endpoints.label(self.version)

        def read(reply: Any) -> wire.Scored:
            return wire.read_scores(reply, rollout, top_k, label, self._tokens)

        body = wire.scoring_request(rollout, media, top_k, self._tokens)
        scored = await self._pool.ask(body, read, affinity=seed_for(0, rollout.prompt.uid))
        return TeacherScores(self.name, self.version, scored.logprobs, scored.top_ids, scored.top_logprobs)

    def check(self, rollout: Rollout) -> None:
        """Raises DataError for a rollout that the model cannot read."""
        check_prompt(rollout.prompt, self._config)
        check_tokens(rollout.token_ids, self._config, f"response to prompt {rollout.prompt.uid}")

    def media(self, prompt: Prompt) -> dict[str, Any]:
        """`wire.media_fields` of `prompt` for the present weights."""
        return wire.media_fields(prompt, self._tokens, self._endpoints.label(self.version))

    # ------------------------------------------------------------------ the rest

    def counts(self) -> Counter[str]:
        """What went wrong since the last call, and bytes that went over the wire, by name."""
        counts = self._pool.counts
        self._pool.counts = Counter()
        for server in self._pool.servers:
            counts["bytes"] += server.sent + server.received
            server.sent = server.received = 0
        return counts

    def close(self) -> None:
        """End the connections; the servers go on."""

        async def close() -> None:
            await asyncio.gather(*(server.close() for server in self._pool.servers))

        background.run(close())


class Scoring:
    """Scores under way. Rollouts may be added from any thread; those of one prompt share its encoded media."""

    def __init__(self, engine: SGLangEngine, top_k: int) -> None:
        self._engine = engine
        self._top_k = top_k
        self._media: dict[int, dict[str, Any]] = {}
        self._pending: dict[int, Future[TeacherScores]] = {}

    def add(self, place: int, rollout: Rollout) -> None:
        """Ask for the scores of `rollout`, the result at `place`. Raises DataError for what the model cannot read."""
        self._engine.check(rollout)
        prompt = rollout.prompt
        if id(prompt) not in self._media:
            self._media[id(prompt)] = self._engine.media(prompt)
        self._pending[place] = background.submit(self._engine.ask_score(rollout, self._media[id(prompt)], self._top_k))

    def results(self) -> list[TeacherScores]:
        """The scores in the order of their places, when the last has come. Raises EngineLost as the engine does."""

        async def wait() -> list[TeacherScores]:
            return await _all(asyncio.wrap_future(self._pending[place]) for place in sorted(self._pending))

        return background.run(wait())


def _check_served(config: Any, model_dir: str | os.PathLike[str]) -> None:
    """WeightsError for a model that SGLang would load and compute wrongly."""
    text = config.get_text_config()
    if config.model_type == "qwen3_vl_moe" and len(tapped := config.vision_config.deepstack_visual_indexes) != 3:
        raise WeightsError(
            f"{model_dir}: has {len(tapped)} DeepStack layers; SGLang's Qwen3-VL-MoE "
            "takes exactly three DeepStack layers, as all published ones have"
        )
    if config.model_type.endswith("_moe") and (text.mlp_only_layers or text.decoder_sparse_step != 1):
        raise WeightsError(
            f"{model_dir}: has layers without experts (mlp_only_layers = {text.mlp_only_layers}, decoder_sparse_step = "
            f"{text.decoder_sparse_step}); SGLang expects them in every layer, as all published models have them"
        )


async def _all(work: Iterable[Any]) -> list[Any]:
    """All results; when one fails the others are still waited for, and the gravest failure is raised."""
    results = await asyncio.gather(*work, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise next((failure for failure in failures if not isinstance(failure, EngineLost)), failures[0])
    return results


def _nothing(place: int, rollout: Rollout) -> None:
    """What happens when nobody waits for single rollouts."""
