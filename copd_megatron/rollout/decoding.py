"""The passes of the embedded engine: computing prompts, sampling behind them, scoring what is given.

Functions of a transformers module (hf_module.py), called in inference mode. They call its language model and its vision
tower, if it has one, themselves, since `forward` of the whole model would compute a prompt anew for every rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from copd_megatron.rollout.decoder import Decoder
from copd_megatron.rollout.hf_module import language_model
from copd_megatron.rollout.kv_cache import roomy_cache
from copd_megatron.rollout.prompt_batch import PromptBatch
from copd_megatron.rollout.sampling import choose, likeliest, token_logprobs
from copd_megatron.rollout.types import Sampling

if TYPE_CHECKING:
    from transformers import DynamicCache

Look = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, ...]]

LOGITS_AT_ONCE = 2**25
"""Logits that exist at a time while scoring, in numbers: 128 MiB of float32."""

KEPT_SHARE = 0.75
"""Finished rows are dropped when no more than this share of the rows is left."""


@dataclass
class Rows:
    """Sequences in progress: their cache, and what the next token depends on.

    `hidden` [B, H] of the last token; `position` int64 [B] of the next; `mask` bool [B, S] of the cached columns, or
    None where none is padding.
    """

    cache: DynamicCache
    hidden: torch.Tensor
    position: torch.Tensor
    mask: torch.Tensor | None

    def select(self, rows: torch.Tensor) -> Rows:
        """The rows `rows` (repetition allowed), in that order. The cache is changed in place."""
        self.cache.batch_select_indices(rows)
        mask = None if self.mask is None else self.mask[rows]
        return Rows(self.cache, self.hidden[rows], self.position[rows], mask)


def prefill(model: Any, batch: PromptBatch, room: int) -> Rows:
    """Compute prompts, media included: one row each, ready for a response of about `room` tokens."""
    language = language_model(model)
    embeddings = language.embed_tokens(batch.token_ids)
    visual: dict[str, Any] = {}
    if batch.pixel_values is not None and batch.visual is not None:
        tower = model.model.visual
        features = tower(batch.pixel_values.to(tower.dtype), grid_thw=batch.grid_thw, return_dict=True)
        embeddings = embeddings.masked_scatter(batch.visual[..., None], features.pooler_output.to(embeddings))
        if hasattr(features, "deepstack_features"):
            visual = {"visual_pos_masks": batch.visual, "deepstack_visual_embeds": features.deepstack_features}
    cache = roomy_cache(len(language.layers), room)
    hidden = language(
        inputs_embeds=embeddings,
        attention_mask=batch.mask,
        position_ids=batch.position_ids if hasattr(model.config, "vision_config") else batch.position_ids[0],
        past_key_values=cache,
        use_cache=True,
        **visual,
    ).last_hidden_state
    return Rows(cache, hidden[:, -1], batch.next_position, batch.mask)


def sample(
    model: Any, decoder: Decoder, rows: Rows, uniform: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample behind `rows`, each a rollout of its own, until a stop token or `max_new_tokens`.

    `uniform` float64 [B, max_new_tokens] are the random numbers. Returns token ids int64 and logprobs float32
    [B, max_new_tokens] and lengths int64 [B], on the CPU; what lies behind a row's length has no meaning.
    """
    count, steps = uniform.shape
    tokens = torch.zeros(count, steps, dtype=torch.int64, device=uniform.device)
    logprobs = torch.zeros(count, steps, device=uniform.device)
    lengths = torch.full((count,), steps, device=uniform.device)
    stop = torch.tensor(sampling.stop_token_ids, dtype=torch.int64, device=uniform.device)
    place = torch.arange(count, device=uniform.device)
    going = torch.ones(count, dtype=torch.bool, device=uniform.device)
    cos, sin = decoder.angles(rows.position[:, None] + torch.arange(steps, device=uniform.device))
    mask = rows.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(count, steps)], dim=1)
    columns = rows.cache.get_seq_length()
    for step in range(steps):
        chosen, values = choose(model.lm_head(rows.hidden), uniform[place, step], sampling)
        tokens[place, step] = chosen
        logprobs[place, step] = values
        ended = going & torch.isin(chosen, stop)
        lengths[place[ended]] = step + 1
        going &= ~ended
        left = int(going.sum())
        if left == 0 or step == steps - 1:
            break
        # Dropping rows copies the cache of those that stay: worth it once much of the work would be wasted.
        if left <= KEPT_SHARE * len(going):
            kept = going.nonzero()[:, 0]
            rows, place, going, chosen = rows.select(kept), place[kept], going[kept], chosen[kept]
            cos, sin = cos[kept], sin[kept]
            mask = None if mask is None else mask[kept]
        seen = None if mask is None else mask[:, : columns + step + 1]
        angles = cos[:, step : step + 1], sin[:, step : step + 1]
        rows.hidden = decoder.extend(chosen[:, None], angles, rows.cache, seen)[:, 0]
    return tokens.cpu(), logprobs.cpu(), lengths.cpu()


def score(
    model: Any,
    decoder: Decoder,
    rows: Rows,
    responses: Sequence[Sequence[int]],
    top_k: int,
    temperature: float,
) -> list[tuple[torch.Tensor, ...]]:
    """Per response, one behind each row: its tokens' logprobs [R], the top-k ids [R, K] and their logprobs [R, K]."""

    def look(logits: torch.Tensor, targets: torch.Tensor, place: slice) -> tuple[torch.Tensor, ...]:
        distribution = token_logprobs(logits, temperature)
        best, values = likeliest(distribution, min(top_k, logits.shape[-1]))
        return distribution.gather(-1, targets[:, None])[:, 0], best, values

    return look_at(model, decoder, rows, responses, look)


def look_at(
    model: Any, decoder: Decoder, rows: Rows, responses: Sequence[Sequence[int]], look: Look
) -> list[tuple[torch.Tensor, ...]]:
    """What `look` gives for the tokens of each response, on the CPU.

    It is called with logits [N, V] and the ids int64 [N] of some of the tokens, and their place among those of all
    responses one after the other, and returns tensors [N, …].
    """
    device = rows.hidden.device
    lengths = torch.tensor([len(response) for response in responses])
    width = int(lengths.max())
    valid = (torch.arange(width) < lengths[:, None]).to(device)
    tokens = torch.zeros(len(responses), width, dtype=torch.int64)
    for row, response in enumerate(responses):
        tokens[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
    tokens = tokens.to(device)
    hidden = rows.hidden[:, None]
    if width > 1:
        # Padding on the right needs no mask: causality keeps it from the tokens before it.
        mask = rows.mask
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(responses), width - 1)], dim=1)
        angles = decoder.angles(rows.position[:, None] + torch.arange(width - 1, device=device))
        hidden = torch.cat([hidden, decoder.extend(tokens[:, :-1], angles, rows.cache, mask)], dim=1)
    hidden, targets = hidden[:, :width][valid], tokens[valid]
    vocabulary = model.config.get_text_config().vocab_size
    at_once = max(1, LOGITS_AT_ONCE // vocabulary)
    parts = []
    for start in range(0, len(hidden), at_once):
        place = slice(start, start + at_once)
        parts.append([found.cpu() for found in look(model.lm_head(hidden[place]), targets[place], place)])
    sizes = lengths.tolist()
    return list(zip(*(torch.cat(column).split(sizes) for column in zip(*parts, strict=True)), strict=True))
