"""What is said to a server, and how its answers are checked. No connection is known here.

Tokens go and come as ids, never as text. A reply that is short, damaged or about something else is a `BadReply`:
nothing of it is used. Facts about the replies (sglang 0.5.23): the first of the rows from `logprob_start_len` on is
null; log-probabilities of prompts are at temperature 1, those of samples at the sampling temperature, over the whole
vocabulary; top log-probabilities come as base64 of little-endian float32 and int32 when asked for.
"""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from copd_megatron.rollout.positions import MediaTokens, media_blocks, prompt_positions
from copd_megatron.rollout.sglang import pixels
from copd_megatron.rollout.types import Prompt, Rollout, Sampling

_SEED_BITS = 0x7FFFFFFF


class BadReply(Exception):
    """A server's answer that cannot be used; asking again may help."""


class BlindServer(BadReply):
    """The server answered without the prompt's images or videos; asking again would not help."""


class StaleServer(BadReply):
    """The server answered with other weights than it should have; the message names them."""


@dataclass(frozen=True)
class Tokens:
    """Facts about the model that requests and replies are checked with; `media` is None for a model of text alone."""

    vocabulary: int
    media: MediaTokens | None


@dataclass(frozen=True)
class Sampled:
    """One response: `token_ids` and float32 `logprobs` [R]."""

    token_ids: tuple[int, ...]
    logprobs: torch.Tensor
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Scored:
    """`logprobs` float32 [R] of given tokens; `top_ids` int64 and `top_logprobs` float32 [R, K], best first."""

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def media_fields(prompt: Prompt, tokens: Tokens, version: str) -> dict[str, Any]:
    """The part of a request that carries the prompt's images and videos; the same for all its rollouts at `version`.

    Videos go frame by frame: in sglang's Qwen2.5-VL patches would attend to those of all frames of theirs, and in
    transformers' they do not. The positions of all tokens come along, since frames are then no longer known as one's.
    """
    if prompt.media is None or tokens.media is None:
        return {}
    blocks = media_blocks(prompt.token_ids, prompt.media, tokens.media)
    positions: torch.Tensor | None = prompt_positions(prompt.token_ids, prompt.media, tokens.media)
    pixel_values = prompt.media.pixel_values.split(prompt.media.grid_thw.prod(-1).tolist())
    seconds = dict(zip(prompt.media.videos, prompt.media.seconds, strict=True))
    fields: dict[str, Any] = {}
    for name, videos in (("image_data", False), ("video_data", True)):
        chosen = [item for item in range(len(pixel_values)) if (item in seconds) == videos]
        if not chosen:
            continue
        parts = [(block, block.frames if videos else 1) for block in blocks if block.item in chosen]
        grids = prompt.media.grid_thw[chosen]
        if videos:
            one = torch.cat([torch.ones_like(grids[:, :1]), grids[:, 1:]], dim=1)
            grids = one.repeat_interleave(grids[:, 0], dim=0)
        starts = [
            (block.first + block.count // count * part, block.count // count)
            for block, count in parts
            for part in range(count)
        ]
        patches = pixels.Patches(
            pixel_values=torch.cat([pixel_values[item] for item in chosen]),
            grid_thw=grids,
            offsets=tuple((start, start + size - 1) for start, size in starts),
            weights=version,
            seconds=tuple(seconds[block.item] for block, count in parts for _ in range(count)) if videos else (),
            positions=positions,
        )
        fields[name] = [pixels.encode(patches)]
        positions = None
    return fields


def sampling_request(prompt: Prompt, media: dict[str, Any], sampling: Sampling, seed: int) -> dict[str, Any]:
    """The body of `/generate` that samples one rollout; `media` are the prompt's `media_fields`."""
    return {
        "input_ids": list(prompt.token_ids),
        **media,
        "sampling_params": {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "stop_token_ids": list(sampling.stop_token_ids),
            # Besides them the model's own end stops a response; where nothing is to stop it, that must not either.
            "ignore_eos": not sampling.stop_token_ids,
            "sampling_seed": seed & _SEED_BITS,
        },
        "return_logprob": True,
    }


def scoring_request(rollout: Rollout, media: dict[str, Any], top_k: int, tokens: Tokens) -> dict[str, Any]:
    """The body of `/generate` that scores one rollout's tokens and samples nothing."""
    prompt = rollout.prompt
    return {
        "input_ids": [*prompt.token_ids, *rollout.token_ids],
        **media,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": len(prompt.token_ids) - 1,
        "top_logprobs_num": min(top_k, tokens.vocabulary),  # beyond the vocabulary the server's scheduler dies
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }


def read_sample(reply: Any, prompt: Prompt, sampling: Sampling, version: str, tokens: Tokens) -> Sampled:
    """One sampled response. Raises BadReply."""
    meta = _meta(reply, len(prompt.token_ids), prompt, version, tokens)
    ids = reply.get("output_ids")
    pairs = meta.get("output_token_logprobs")
    reason = (meta.get("finish_reason") or {}).get("type")
    if not _ints(ids) or not isinstance(pairs, list) or len(pairs) != len(ids) or not ids:
        raise BadReply(f"{_length(ids)} tokens with {_length(pairs)} log-probabilities")
    try:
        logprobs = np.array([pair[0] for pair in pairs], np.float32)
        named = [pair[1] for pair in pairs]
    except (TypeError, IndexError, ValueError) as error:
        raise BadReply(f"log-probabilities cannot be read: {error}") from error
    if named != ids or min(ids) < 0 or max(ids) >= tokens.vocabulary:
        raise BadReply("log-probabilities are of other tokens than the response's")
    if not np.isfinite(logprobs).all():
        raise BadReply(f"a log-probability is {logprobs[~np.isfinite(logprobs)][0]}")
    stop = set(sampling.stop_token_ids)
    stopped = ids[-1] in stop
    if reason == "stop" and not stopped:
        raise BadReply(f"it ended at token {ids[-1]}, which is none of the stop tokens {sorted(stop)}")
    if (
        reason not in ("stop", "length")
        or len(ids) > sampling.max_new_tokens
        or any(token in stop for token in ids[:-1])
        or not (stopped or len(ids) == sampling.max_new_tokens)
    ):
        raise BadReply(f"{len(ids)} of {sampling.max_new_tokens} tokens, ended by {reason!r}")
    return Sampled(tuple(ids), torch.from_numpy(logprobs), "stop" if stopped else "length")


def read_scores(reply: Any, rollout: Rollout, top_k: int, version: str, tokens: Tokens) -> Scored:
    """The scores of `rollout`. Raises BadReply."""
    prompt, response = rollout.prompt, rollout.token_ids
    meta = _meta(reply, len(prompt.token_ids) + len(response), prompt, version, tokens)
    rows = meta.get("input_token_logprobs")
    count, k = len(response), min(top_k, tokens.vocabulary)
    if not isinstance(rows, list) or len(rows) != count + 1:
        raise BadReply(f"scores of {_length(rows)} tokens, expected {count + 1}")
    try:
        logprobs = np.array([row[0] for row in rows[1:]], np.float32)
        named = [row[1] for row in rows[1:]]
    except (TypeError, IndexError, ValueError) as error:
        raise BadReply(f"scores cannot be read: {error}") from error
    # The server replaces ids that its media's tokens might have, from the vocabulary's last one on, by 0.
    if named != [0 if token >= tokens.vocabulary - 1 else token for token in response]:
        raise BadReply("scores are of other tokens than the response's")
    top, ids = _top(meta, count, k)
    if np.isnan(logprobs).any() or np.isnan(top).any():
        raise BadReply("a score is NaN")
    if k and (ids.min(initial=0) < 0 or ids.max(initial=0) >= tokens.vocabulary):
        raise BadReply(f"a top token lies outside the vocabulary of {tokens.vocabulary}")
    return Scored(torch.from_numpy(logprobs), torch.from_numpy(ids), torch.from_numpy(top))


def _top(meta: dict[str, Any], count: int, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Log-probabilities and ids [count, k] of the compact form."""
    if k == 0:
        return np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)
    name = "input_top_logprobs"
    try:
        if (meta[f"{name}_val_flat_b64_dtype"], meta[f"{name}_idx_flat_b64_dtype"]) != ("float32", "int32"):
            raise BadReply("top log-probabilities are not float32 and int32")
        values = np.frombuffer(b64decode(meta[f"{name}_val_flat_b64"], validate=True), "<f4")
        ids = np.frombuffer(b64decode(meta[f"{name}_idx_flat_b64"], validate=True), "<i4")
        null, shape = meta[f"{name}_null_prefix"], list(meta[f"{name}_shape"])
        expected = [count + 1 - null, k]
        if null not in (0, 1) or shape != expected or values.size != ids.size or values.size != expected[0] * k:
            raise BadReply(f"top log-probabilities of shape {shape} behind {null}, expected [{count}, {k}] behind 1")
    except BadReply:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise BadReply(f"top log-probabilities cannot be read: {type(error).__name__}: {error}") from error
    keep = slice(1 - null, None)
    return (
        values.reshape(shape)[keep].astype(np.float32),
        ids.reshape(shape)[keep].astype(np.int64),
    )


def _meta(reply: Any, length: int, prompt: Prompt, version: str, tokens: Tokens) -> dict[str, Any]:
    """The reply's `meta_info`, if it is about these tokens, these media and these weights."""
    meta = reply.get("meta_info") if isinstance(reply, dict) else None
    if not isinstance(meta, dict):
        raise BadReply("no meta_info")
    if meta.get("prompt_tokens") != length:
        raise BadReply(f"the server read {meta.get('prompt_tokens')} tokens, it was sent {length}")
    for kind, videos in (("image", False), ("video", True)):
        seen = meta.get(f"{kind}_tokens") or 0
        sent = 0 if tokens.media is None else tokens.media.merged(prompt.media, videos)
        if seen != sent:
            raise BlindServer(
                f"prompt {prompt.uid}: the server saw {seen} {kind} tokens, the student {sent}; start the server with "
                "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE=copd_megatron.rollout.sglang.processors (docs/sglang.md)"
            )
    spans = meta.get("weight_versions") or [{"version": meta.get("weight_version")}]
    versions = {span.get("version") for span in spans}
    if versions != {version}:
        raise StaleServer(", ".join(sorted(map(str, versions))))
    return meta


def _ints(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)


def _length(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else f"no list of ({type(value).__name__})"
