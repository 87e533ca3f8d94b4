"""A rollout engine inside the branch's own process: transformers' Qwen3-VL, fed with Hugging Face named weights.

The loop over tokens is ours, on transformers' language model and vision tower, for three things that `generate` of
transformers does not do: a prompt, images included, is computed once for all G rollouts; every random number
comes from a named seed and not from the process's generator; the logprob of each sampled token comes with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from copd_megatron.errors import WeightsError
from copd_megatron.rollout.hf_module import WeightLoader, open_module, open_tokenizer
from copd_megatron.rollout.prompt_batch import check_prompt, prompt_batch
from copd_megatron.rollout.sampling import check_sampling, choose, random_numbers, token_logprobs
from copd_megatron.rollout.types import Prompt, Rollout, Sampling, TeacherScores
from copd_megatron.weights.hf import HfFolder

if TYPE_CHECKING:
    from transformers import DynamicCache

# Logits that exist at once while scoring, in numbers: 128 MiB of float32.
_LOGITS_AT_ONCE = 2**25


@dataclass
class _Rows:
    """Sequences in progress: their cache and what the next token depends on.

    `hidden` [B, H] of the last token; `position` int64 [B] of the next; `mask` bool [B, S] of the cached columns, or
    None where none is padding.
    """

    cache: DynamicCache
    hidden: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor | None

    def select(self, rows: torch.Tensor) -> _Rows:
        """The rows `rows` (repetition allowed), in that order. The cache is changed in place."""
        self.cache.batch_select_indices(rows)
        return _Rows(self.cache, self.hidden[rows], self.position[rows], None if self.mask is None else self.mask[rows])


class EmbeddedEngine:
    """A `RolloutEngine` (rollout/engine.py) on a transformers module.

    `model_dir` is a Hugging Face folder of a dense Qwen3-VL with its tokenizer; with `load_weights` its weights are
    version 0, without it there is no version (-1) until `update_weights`. At most `max_rows` sequences are computed
    at a time (one prompt's rollouts are never split). Raises WeightsError if the folder cannot be used.
    """

    def __init__(
        self,
        name: str,
        model_dir: str | Path,
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

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, the rollouts of one prompt next to each other, in the prompts' order.

        A rollout depends on its prompt, its place in the list and `seed`, and up to rounding on nothing else.
        Raises DataError for a prompt whose images do not fit its tokens, ValueError for impossible settings.
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
                rows = self._prefill([prompts[index] for index in chunk])
                rows = rows.select(torch.arange(len(chunk), device=self._device).repeat_interleave(n))
                tokens, logprobs, lengths = self._decode(rows, uniform[places], sampling)
            for place, ids, values, length in zip(places, tokens.tolist(), logprobs, lengths.tolist(), strict=True):
                # A copy made outside inference mode: the trainer's graph cannot hold an inference tensor.
                responses[place] = ids[:length], values[:length].clone()
        return self._rollouts(prompts, responses, sampling)

    def score(self, rollouts: Sequence[Rollout], top_k: int, temperature: float) -> list[TeacherScores]:
        """Log-probabilities of the rollouts' own tokens and of the `top_k` likeliest, one result per rollout.

        A `top_k` above the vocabulary's size V means all of it (K is then V). Rollouts that share a `Prompt` object
        share its computation. Raises DataError for a prompt whose images do not fit its tokens.
        """
        if top_k < 0 or temperature < 0:
            raise ValueError(f"top_k is {top_k} and temperature {temperature}, expected 0 or more")
        prompts = list({id(rollout.prompt): rollout.prompt for rollout in rollouts}.values())
        self._check(prompts)
        place = {id(prompt): index for index, prompt in enumerate(prompts)}
        members: list[list[int]] = [[] for _ in prompts]
        for index, rollout in enumerate(rollouts):
            members[place[id(rollout.prompt)]].append(index)
        results: dict[int, TeacherScores] = {}
        for chunk in _chunks(prompts, [len(group) for group in members], self._max_rows):
            indices = [index for prompt in chunk for index in members[prompt]]
            prompt_of = [row for row, prompt in enumerate(chunk) for _ in members[prompt]]
            with torch.inference_mode():
                rows = self._prefill([prompts[index] for index in chunk])
                rows = rows.select(torch.tensor(prompt_of, device=self._device))
                responses = [rollouts[index].token_ids for index in indices]
                parts = self._score(rows, responses, top_k, temperature)
            for index, (logprobs, ids, top) in zip(indices, zip(*parts, strict=True), strict=True):
                results[index] = TeacherScores(self.name, self.version, logprobs.clone(), ids.clone(), top.clone())
        return [results[index] for index in range(len(rollouts))]

    def _check(self, prompts: Iterable[Prompt]) -> None:
        if not self._loader.intact or self.version < 0:
            raise WeightsError(f"engine {self.name!r} has no complete set of weights; call update_weights first")
        for prompt in prompts:
            check_prompt(prompt, self.model.config)

    def _prefill(self, prompts: Sequence[Prompt]) -> _Rows:
        """Compute prompts, images included: one row each, ready for the first token of the response."""
        from copd_megatron.rollout.kv_cache import roomy_cache

        batch = prompt_batch(prompts, self.model.model, self._device)
        language = self.model.model.language_model
        embeddings = language.embed_tokens(batch.token_ids)
        visual: dict[str, Any] = {}
        if batch.pixel_values is not None:
            tower = self.model.model.visual
            features = tower(batch.pixel_values.to(tower.dtype), grid_thw=batch.grid_thw, return_dict=True)
            is_image = batch.token_ids == self.model.config.image_token_id
            embeddings = embeddings.masked_scatter(is_image[..., None], features.pooler_output.to(embeddings))
            visual = {"visual_pos_masks": is_image, "deepstack_visual_embeds": features.deepstack_features}
        cache = roomy_cache(len(language.layers))
        hidden = language(
            inputs_embeds=embeddings,
            attention_mask=batch.mask,
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=True,
            **visual,
        ).last_hidden_state
        return _Rows(cache, hidden[:, -1], batch.next_position, batch.mask)

    def _extend(self, rows: _Rows, token_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [B, new tokens, H] of `token_ids` int64 [B, new tokens] behind `rows`, which are extended.

        `mask` covers the cached and the new columns; None if none is padding.
        """
        language = self.model.model.language_model
        steps = torch.arange(token_ids.shape[1], device=self._device)
        position_ids = (rows.position[:, None] + steps).expand(3, -1, -1)
        rows.position = rows.position + token_ids.shape[1]
        return language(
            inputs_embeds=language.embed_tokens(token_ids),
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=rows.cache,
            use_cache=True,
        ).last_hidden_state

    def _decode(
        self, rows: _Rows, uniform: torch.Tensor, sampling: Sampling
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample until a stop token or `max_new_tokens`, on rows that are B rollouts of their own.

        Returns token ids int64 [B, steps], their logprobs float32 [B, steps] and lengths int64 [B], on the CPU; what
        lies behind a row's length has no meaning.
        """
        count, steps = uniform.shape
        tokens = torch.zeros(count, steps, dtype=torch.int64, device=self._device)
        logprobs = torch.zeros(count, steps, device=self._device)
        lengths = torch.full((count,), steps, device=self._device)
        stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=self._device)
        place = torch.arange(count, device=self._device)
        going = torch.ones(count, dtype=torch.bool, device=self._device)
        mask = rows.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(count, steps)], dim=1)[:, None, None]
        columns = rows.cache.get_seq_length()
        for step in range(steps):
            chosen, values = choose(self.model.lm_head(rows.hidden), uniform[place, step], sampling)
            tokens[place, step] = chosen
            logprobs[place, step] = values
            ended = going & torch.isin(chosen, stop)
            lengths[place[ended]] = step + 1
            going &= ~ended
            left = int(going.sum())
            if left == 0 or step == steps - 1:
                break
            # Dropping rows copies the whole cache: worth it once half of the work would be wasted.
            if 2 * left <= len(going):
                kept = going.nonzero()[:, 0]
                rows, place, going, chosen = rows.select(kept), place[kept], going[kept], chosen[kept]
                mask = None if mask is None else mask[kept]
            seen = None if mask is None else mask[..., : columns + step + 1]
            rows.hidden = self._extend(rows, chosen[:, None], seen)[:, 0]
        return tokens.cpu(), logprobs.cpu(), lengths.cpu()

    def _score(
        self, rows: _Rows, responses: Sequence[Sequence[int]], top_k: int, temperature: float
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """Teacher-forced logprobs [R], top-k ids [R, K] and their logprobs [R, K] of each response."""
        lengths = torch.tensor([len(response) for response in responses])
        width = int(lengths.max())
        valid = (torch.arange(width) < lengths[:, None]).to(self._device)
        padded = torch.zeros(len(responses), width, dtype=torch.int64)
        for row, response in enumerate(responses):
            padded[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
        padded = padded.to(self._device)
        hidden = rows.hidden[:, None]
        if width > 1:
            # Padding on the right needs no mask: causality keeps it from the tokens before it.
            mask = rows.mask
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(responses), width - 1)], dim=1)
            hidden = torch.cat([hidden, self._extend(rows, padded[:, :-1], mask)], dim=1)
        hidden, targets = hidden[:, :width][valid], padded[valid]
        k = min(top_k, self.model.config.text_config.vocab_size)
        logprobs, ids, top = [], [], []
        for part in _slices(len(targets), max(1, _LOGITS_AT_ONCE // self.model.config.text_config.vocab_size)):
            distribution = token_logprobs(self.model.lm_head(hidden[part]), temperature)
            best = distribution.topk(k, dim=-1)
            logprobs.append(distribution.gather(-1, targets[part, None])[:, 0].cpu())
            ids.append(best.indices.cpu())
            top.append(best.values.cpu())
        sizes = lengths.tolist()
        return tuple(torch.cat(pieces).split(sizes) for pieces in (logprobs, ids, top))  # type: ignore[return-value]

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


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)] or [slice(0, 0)]
