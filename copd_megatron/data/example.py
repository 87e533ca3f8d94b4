"""One row of a data set, before any tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Video:
    """Frames taken from a video, in order: `indices` numbers them, from 0, among the `total` frames that the video
    shows at `fps` frames per second. Frame i stands for the moment `indices[i] / fps`, in seconds."""

    frames: tuple[Image.Image, ...]
    fps: float
    indices: tuple[int, ...]
    total: int

    @staticmethod
    def of(frames: tuple[Image.Image, ...], fps: float) -> Video:
        """A video of which all frames are there."""
        return Video(frames, fps, tuple(range(len(frames))), len(frames))


@dataclass(frozen=True)
class Example:
    """A question with its images, its videos and its gold answer.

    `messages` are chat messages in Hugging Face format: `{"role": ..., "content": text or parts}` with the parts
    `{"type": "text", "text": ...}`, `{"type": "image"}` and `{"type": "video"}`; the n-th image part stands for
    `images[n]`, the n-th video part for `videos[n]`. `verifier` names the function in `rewards` that judges a response
    against `answer`. `response` is a demonstration for the supervised cold start, None where there is none.
    """

    uid: str
    messages: list[dict[str, Any]]
    answer: str
    verifier: str
    images: tuple[Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()
    response: str | None = None
