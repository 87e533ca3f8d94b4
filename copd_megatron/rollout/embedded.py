"""A rollout engine inside the branch's own process: transformers' module, fed with Hugging Face named weights.

The loop over tokens is ours, on transformers' language model and vision tower, for three things that `generate` of
transformers does not do: a prompt, media included, is computed once for all G rollouts; every random number
comes from a named seed and not from the process's generator; the logprob of each sampled token comes with it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.rollout import decoding
from copd_megatron.rollout.decoder import Decoder
from copd_megatron.rollout.hf_module import WeightLoader, language_model, open_module, open_tokenizer
from copd_megatron.rollout.positions import MediaTokens
from copd_megatron.rollout.prompt_batch import check_prompt, check_tokens, prompt_batch
from copd_megatron.rollout.sampling import check_sampling, random_numbers
from copd_megatron.rollout.types import Prompt, Rollout, Sampling, TeacherScores
from copd_megatron.weights.hf import HfFolder


class EmbeddedEngine:
    """A `RolloutEngine` (rollout/engine.py) on a transformers module.

    `model_dir` is a Hugging Face folder of a model in `hf_module.CLASSES`, with its tokenizer; with `load_weights` its
    weights are version 0, without it there is no version (-1) until `update_weights`. At most `max_rows` sequences are
    computed at a time (one prompt's rollouts are never split). Raises WeightsError if the folder cannot be used.
    """

    def __init__(
        self,
        name: str,
        model_dir: str | os.PathLike[str],
        dtype: torch.dtype = torch.float32,
        *,
        load_weights: bool = True,
        max_rows: int = 512,
        device: str | torch.device = "cpu",
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows is {max_rows}, expected at least 1")
        self.name = name
        self.version = -1
        self.model: Any = open_module(Path(model_dir), dtype).to(device)
        self.tokenizer: Any = open_tokenizer(Path(model_dir))
        self._media_tokens = MediaTokens.of(self.model.config)
        self._decoder = Decoder(language_model(self.model))
        self._loader = WeightLoader(self.model)
        self._max_rows = max_rows
        self._device = torch.device(device)
        if load_weights:
            self.update_weights(HfFolder(model_dir).tensors(), version=0)

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Take the Hugging Face named tensors as the weights of `version`; all must be there, once.

        Tensors are copied as they come. Raises WeightsError for an unknown, missing or misshapen one; if others had
        been copied by then, the engine refuses to work until a complete set has come.
        """
        self._loader.load(named)
        self.version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        seed: int,
        finished: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, the rollouts of one prompt next to each other, in the prompts' order.

        `finished` is told each of them, with its place, when all are there. A rollout depends on its prompt, its place
        in the list and `seed`, and up to rounding on nothing else. Raises DataError for a prompt whose media do not
        fit its tokens or the model, ValueError for impossible settings.
        """
        check_sampling(sampling)
        self._check(prompts)
        if not prompts:
            return []
        n = sampling.n
        uniform = random_numbers(seed, len(prompts) * n, sampling.max_new_tokens).to(self._device)
        responses: list[tuple[list[int], torch.Tensor]] = [([], torch.empty(0))] * len(uniform)
        for chunk in _chunks(prompts, [n] * len(prompts), self._max_rows):
            places = [index * n + sample for index in chunk for sample in range(n)]
            with torch.inference_mode():
                rows = self._prefill([prompts[index] for index in chunk], [n] * len(chunk), sampling.max_new_tokens)
                tokens, logprobs, lengths = decoding.sample(self.model, self._decoder, rows, uniform[places], sampling)
            for place, ids, values, length in zip(places, tokens.tolist(), logprobs, lengths.tolist(), strict=True):
                # A copy made outside inference mode: the trainer's graph cannot hold an inference tensor.
                responses[place] = ids[:length], values[:length].clone()
        rollouts = self._rollouts(prompts, responses, sampling)
        if finished is not None:
            for place, rollout in enumerate(rollouts):
                finished(place, rollout)
        return rollouts

    def score(self, rollouts: Sequence[Rollout], top_k: int, temperature: float) -> list[TeacherScores]:
        """Log-probabilities of the rollouts' own tokens and of the `top_k` likeliest, one result per rollout.

        A `top_k` above the vocabulary's size V means all of it (K is then V). Rollouts that share a `Prompt` object
        share its computation. Raises DataError for tokens the model does not know and for media that do not fit them.
        """
        if top_k < 0 or temperature < 0:
            raise ValueError(f"top_k is {top_k} and temperature {temperature}, expected 0 or more")

        def look(rows: decoding.Rows, indices: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
            responses = [rollouts[index].token_ids for index in indices]
            return decoding.score(self.model, self._decoder, rows, responses, top_k, temperature)

        return [TeacherScores(self.name, self.version, *found) for found in self._behind(rollouts, look)]

    def values(self, rollouts: Sequence[Rollout], read: Callable[..., tuple[torch.Tensor, ...]]) -> list[Any]:
        """One tuple per rollout, of what `read` makes of this engine's logits at the states of rollouts that a teacher
        has scored.

        `read(logits [N, V], ids int64 [N], top_ids int64 [N, K], top_logprobs [N, K])` is asked about some tokens at a
        time, ids being the rollouts' own and the top-k their teacher's, and returns tensors [N, …]. Raises what `score`
        does.
        """

        def look(rows: decoding.Rows, indices: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
            chosen = [rollouts[index] for index in indices]
            scores = [rollout.teacher for rollout in chosen if rollout.teacher is not None]
            ids = torch.cat([score.top_ids for score in scores]).to(self._device)
            logprobs = torch.cat([score.top_logprobs for score in scores]).to(self._device)
            return decoding.look_at(
                self.model,
                self._decoder,
                rows,
                [rollout.token_ids for rollout in chosen],
                lambda logits, targets, place: read(logits, targets, ids[place], logprobs[place]),
            )

        if any(rollout.teacher is None for rollout in rollouts):
            raise ValueError("expected rollouts that a teacher has scored, found one that none has")
        return self._behind(rollouts, look)

    def _behind(
        self,
        rollouts: Sequence[Rollout],
        look: Callable[[decoding.Rows, Sequence[int]], list[tuple[torch.Tensor, ...]]],
    ) -> list[tuple[torch.Tensor, ...]]:
        """What `look` gives for each rollout: it is called with one row for each of some rollouts, behind its prompt,
        and with their indices."""
        prompts = list({id(rollout.prompt): rollout.prompt for rollout in rollouts}.values())
        self._check(prompts)
        for rollout in rollouts:
            check_tokens(rollout.token_ids, self.model.config, f"response to prompt {rollout.prompt.uid}")
        place = {id(prompt): index for index, prompt in enumerate(prompts)}
        members: list[list[int]] = [[] for _ in prompts]
        for index, rollout in enumerate(rollouts):
            members[place[id(rollout.prompt)]].append(index)
        results: dict[int, tuple[torch.Tensor, ...]] = {}
        for chunk in _chunks(prompts, [len(group) for group in members], self._max_rows):
            indices = [index for prompt in chunk for index in members[prompt]]
            with torch.inference_mode():
                copies = [len(members[prompt]) for prompt in chunk]
                room = max(len(rollouts[index].token_ids) for index in indices)
                found = look(self._prefill([prompts[prompt] for prompt in chunk], copies, room), indices)
            for index, tensors in zip(indices, found, strict=True):
                results[index] = tuple(tensor.clone() for tensor in tensors)
        return [results[index] for index in range(len(rollouts))]

    def begin_scoring(self, top_k: int, temperature: float) -> Collected:
        """Scores of rollouts that come one by one; computed together, when they are asked for."""
        return Collected(self, top_k, temperature)

    def counts(self) -> Counter[str]:
        """Nothing happens to an engine that is part of this process."""
        return Counter()

    def close(self) -> None:
        """Memory is all that it holds."""

    def _check(self, prompts: Iterable[Prompt]) -> None:
        if not self._loader.intact or self.version < 0:
            raise WeightsError(f"engine {self.name!r} has no complete set of weights; call update_weights first")
        for prompt in prompts:
            check_prompt(prompt, self.model.config)

    def _prefill(self, prompts: Sequence[Prompt], copies: Sequence[int], room: int) -> decoding.Rows:
        """Compute each prompt once; the result has `copies[i]` rows of prompt i, next to each other, for responses of
        up to `room` tokens."""
        rows = decoding.prefill(self.model, prompt_batch(prompts, self._media_tokens, self._device), room)
        numbers = torch.arange(len(prompts)).repeat_interleave(torch.tensor(copies))
        return rows.select(numbers.to(self._device))

    def _rollouts(
        self, prompts: Sequence[Prompt], responses: Sequence[tuple[list[int], torch.Tensor]], sampling: Sampling
    ) -> list[Rollout]:
        stop = set(sampling.stop_token_ids)
        stopped = [ids[-1] in stop for ids, _ in responses]
        bodies = [ids[:-1] if end else ids for (ids, _), end in zip(responses, stopped, strict=True)]
        texts = self.tokenizer.batch_decode(bodies, skip_special_tokens=True)
        return [
            Rollout(
                prompt=prompts[place // sampling.n],
                token_ids=tuple(ids),
                logprobs=logprobs,
                finish="stop" if end else "length",
                policy_version=self.version,
                text=text,
            )
            for place, ((ids, logprobs), end, text) in enumerate(zip(responses, stopped, texts, strict=True))
        ]


class Collected:
    """Rollouts that wait for their scores."""

    def __init__(self, engine: EmbeddedEngine, top_k: int, temperature: float) -> None:
        self._engine = engine
        self._top_k = top_k
        self._temperature = temperature
        self._rollouts: dict[int, Rollout] = {}

    def add(self, place: int, rollout: Rollout) -> None:
        """Let `rollout` wait, its scores to be the result at `place`."""
        self._rollouts[place] = rollout

    def results(self) -> list[TeacherScores]:
        """All scores in the order of their places."""
        rollouts = [self._rollouts[place] for place in sorted(self._rollouts)]
        return self._engine.score(rollouts, self._top_k, self._temperature) if rollouts else []


def _chunks(prompts: Sequence[Prompt], rows: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Indices of prompts that are computed together: of similar length, with at most `max_rows` rows or one prompt."""
    chunk: list[int] = []
    size = 0
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids)):
        if chunk and size + rows[index] > max_rows:
            yield chunk
            chunk, size = [], 0
        chunk.append(index)
        size += rows[index]
    if chunk:
        yield chunk
