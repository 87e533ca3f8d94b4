"""One row of a data set, before any tokenizer has seen it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Example:
    """A question with its pictures and its gold answer.

    `messages` are chat messages in Hugging Face format: `{"role": ..., "content": text or parts}` with the parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`; the n-th image part stands for `images[n]`. `verifier`
    names the function in `rewards` that judges a response against `answer`. `response` is a demonstration for the
    supervised cold start, None where there is none.
    """

    uid: str
    messages: list[dict[str, Any]]
    answer: str
    verifier: str
    images: tuple[Image.Image, ...] = ()
    response: str | None = None
