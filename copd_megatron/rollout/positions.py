"""Positions of text, image and video tokens (M-RoPE), the same for the policy and for every engine.

Text counts on by one on all three axes (time, row, column). An image begins at one moment, from which its merged
patches spread over rows and columns; what follows continues behind its larger side. Qwen2.5-VL takes a video as one
such block whose frames lie as far apart in time as they were shot. Qwen3-VL takes each frame as an image of its own: a
timestamp stands before it as text. The values are those of transformers' `get_rope_index`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from copd_megatron.errors import DataError
from copd_megatron.rollout.types import Media


@dataclass(frozen=True)
class MediaTokens:
    """How a model takes images and videos: the token ids that stand for merged patches of either, `merge` × `merge`
    patches each. `tokens_per_second` is Qwen2.5-VL's scale of time; None: each frame of a video stands apart."""

    image: int
    video: int
    merge: int
    tokens_per_second: float | None = None

    @staticmethod
    def of(config: Any) -> MediaTokens | None:
        """Those of a transformers configuration; None where the model takes text alone."""
        vision = getattr(config, "vision_config", None)
        if vision is None:
            return None
        return MediaTokens(
            image=config.image_token_id,
            video=config.video_token_id,
            merge=vision.spatial_merge_size,
            tokens_per_second=vision.tokens_per_second if config.model_type == "qwen2_5_vl" else None,
        )

    def merged(self, media: Media | None, videos: bool) -> int:
        """How many tokens the videos of `media` make, or its images."""
        if media is None:
            return 0
        counts = (t * h * w // self.merge**2 for t, h, w in media.grid_thw.tolist())
        return sum(count for number, count in enumerate(counts) if (number in media.videos) == videos)


_KIND = {False: "image", True: "video"}


@dataclass(frozen=True)
class Block:
    """Tokens of one item that lie next to each other: `first` and `count` say where, `item` whose they are. They are a
    box of `frames` × `rows` × `columns`, its frames `interval` apart."""

    item: int
    first: int
    frames: int
    rows: int
    columns: int
    interval: float

    @property
    def count(self) -> int:
        return self.frames * self.rows * self.columns

    def axes(self) -> Tensor:
        """Position ids int64 [3, count], counted from the block's beginning."""
        time = (torch.arange(self.frames) * torch.tensor(self.interval, dtype=torch.float32)).long()
        box = torch.meshgrid(time, torch.arange(self.rows), torch.arange(self.columns), indexing="ij")
        return torch.stack([axis.flatten() for axis in box])


def media_blocks(token_ids: Sequence[int], media: Media | None, tokens: MediaTokens) -> list[Block]:
    """Where in a prompt the tokens of its media are, from left to right.

    DataError if its image and video tokens do not stand in runs that fit the grids, in the order of the items.
    """
    places = [place for place, token in enumerate(token_ids) if token in (tokens.image, tokens.video)]
    in_videos = sum(token_ids[place] == tokens.video for place in places)
    _check_counts(media, tokens, {False: len(places) - in_videos, True: in_videos})
    blocks: list[Block] = []
    seen = 0
    for item, video, frames, rows, columns, interval in _boxes(media, tokens):
        block = Block(item, places[seen], frames, rows, columns, interval)
        seen += block.count
        own = token_ids[block.first : block.first + block.count]
        if own.count(tokens.video if video else tokens.image) != block.count:
            raise DataError(
                f"the {_KIND[video]} at token {block.first} is interrupted: its {block.count} tokens must be adjacent, "
                "and the items of media in the order of their tokens"
            )
        blocks.append(block)
    return blocks


def prompt_positions(token_ids: Sequence[int], media: Media | None, tokens: MediaTokens) -> Tensor:
    """Position ids int64 [3, S] of a prompt of S tokens, not to be changed. DataError as `media_blocks`."""
    return _positions(len(token_ids), tuple(media_blocks(token_ids, media, tokens)))


@lru_cache(maxsize=64)  # prompts of one task mostly share a layout
@torch.inference_mode(False)  # whoever asks first: the policy trains with the same tensor
def _positions(length: int, blocks: tuple[Block, ...]) -> Tensor:
    parts: list[Tensor] = []
    token = position = 0
    for block in blocks:
        parts.append(_text(position, block.first - token))
        position += block.first - token
        parts.append(block.axes() + position)
        token, position = block.first + block.count, position + max(block.rows, block.columns)
    parts.append(_text(position, length - token))
    return torch.cat(parts, dim=1)


def continuation_positions(prompt: Tensor, length: int) -> Tensor:
    """Position ids int64 [3, length] of the tokens that follow a prompt with position ids [3, S]."""
    return _text(int(prompt.max()) + 1, length)


def text_positions(length: int) -> Tensor:
    """Position ids int64 [3, length] of a prompt without media."""
    return _text(0, length)


def _text(start: int, length: int) -> Tensor:
    return torch.arange(start, start + length).expand(3, -1)


def _boxes(media: Media | None, tokens: MediaTokens) -> Iterator[tuple[int, bool, int, int, int, float]]:
    """(item, whether it is a video, frames, rows, columns, interval) of every block, in tokens."""
    if media is None:
        return
    seconds = dict(zip(media.videos, media.seconds, strict=True))
    for item, (frames, rows, columns) in enumerate(media.grid_thw.tolist()):
        video, size = item in seconds, (rows // tokens.merge, columns // tokens.merge)
        if video and tokens.tokens_per_second is None:
            for _ in range(frames):
                yield item, video, 1, *size, 1.0
        else:
            yield item, video, frames, *size, _interval(seconds[item], tokens) if video else 1.0


def _interval(seconds: float, tokens: MediaTokens) -> float:
    """Positions from frame to frame; float32 as transformers computes it, since only whole positions count."""
    return float(torch.tensor(seconds, dtype=torch.float32) * (tokens.tokens_per_second or 1.0))


def _check_counts(media: Media | None, tokens: MediaTokens, found: dict[bool, int]) -> None:
    items = 0 if media is None else len(media.grid_thw)
    videos = 0 if media is None else len(media.videos)
    for video, count in ((False, items - videos), (True, videos)):
        expected = tokens.merged(media, video)
        if found[video] != expected:
            kind = _KIND[video]
            raise DataError(
                f"{found[video]} {kind} tokens, but {count} {kind}s that make {expected}; tokens and media must come "
                "from one call of the processor and travel together"
            )
