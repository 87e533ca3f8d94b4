"""From an `Example` to a `Prompt`: chat template, tokens, one image or video token per merged patch, pixels.

The result is what the plain Hugging Face processor gives for the example, bit for bit. Its parts are called one by
one because that is several times faster on many small pictures, and because every picture can then be measured before
it is decoded: a prompt beyond the limit costs next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import TemplateError

from copd_megatron.data.example import Example
from copd_megatron.data.patches import Item, Patcher, decode
from copd_megatron.errors import DataError, WeightsError
from copd_megatron.rollout.types import Prompt
from copd_megatron.weights.hf import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLProcessor

END_OF_TURN = "<|im_end|>"


class Refusal(NamedTuple):
    """An example that cannot become a prompt; `reason` is the kind of fault, a colon, and the details."""

    uid: str
    reason: str


@dataclass(frozen=True)
class _Draft:
    """A prompt whose tokens and pixels are still to be made."""

    example: Example
    text: str
    images: list[Item]
    videos: list[Item]


@dataclass(frozen=True)
class TextProcessor:
    """What a model that takes text alone has in the place of a processor."""

    tokenizer: PreTrainedTokenizerBase


class PromptBuilder:
    """Turns examples into prompts of at most `max_prompt_tokens` tokens."""

    def __init__(self, processor: Qwen3VLProcessor | TextProcessor, max_prompt_tokens: int) -> None:
        self.processor: Any = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
        self._patcher = Patcher(self.processor)
        self.max_prompt_tokens = max_prompt_tokens
        if END_OF_TURN not in self.tokenizer.get_vocab():
            raise WeightsError(f"the tokenizer has no token {END_OF_TURN}; use a model with Qwen's chat format")
        self._end_of_turn: int = self.tokenizer.convert_tokens_to_ids(END_OF_TURN)

    def build(self, example: Example, capability: str) -> Prompt:
        """The prompt of one example; `DataError` with its uid and the reason if there is none."""
        prompts, refused = self.build_many([example], capability)
        if refused:
            raise DataError(f"{refused[0].uid}: {refused[0].reason}")
        return prompts[0]

    def build_many(self, examples: Sequence[Example], capability: str) -> tuple[list[Prompt], list[Refusal]]:
        """The prompts of all examples that can have one, in their order, and the refused examples.

        Refused are: messages that the chat template rejects, characters that the tokenizer does not know, image parts
        without an image or the reverse (and the same for videos), an image or a video that cannot be used, any of them
        where the model takes text alone, a prompt beyond `max_prompt_tokens`.
        """
        refused: list[Refusal] = []
        drafts: list[_Draft] = []
        for example in examples:
            try:
                drafts.append(self._measured(example))
            except DataError as error:
                refused.append(Refusal(example.uid, str(error)))
        tokens = self.tokenizer([draft.text for draft in drafts])["input_ids"] if drafts else []
        accepted: list[tuple[_Draft, tuple[int, ...]]] = []
        items: list[list[Item]] = []
        for draft, token_ids in zip(drafts, tokens, strict=True):
            try:
                expanded, order = self._expanded(draft, token_ids)
            except DataError as error:
                refused.append(Refusal(draft.example.uid, str(error)))
                continue
            accepted.append((draft, expanded))
            items.append(order)
        prompts = [
            Prompt(
                uid=draft.example.uid,
                capability=capability,
                token_ids=token_ids,
                answer=draft.example.answer,
                verifier=draft.example.verifier,
                text=draft.text,
                media=media,
            )
            for (draft, token_ids), media in zip(accepted, self._patcher.process(items), strict=True)
        ]
        return prompts, refused

    def response_token_ids(self, response: str) -> tuple[int, ...]:
        """The tokens of an assistant's turn as the policy should produce it: `response`, then `<|im_end|>`."""
        return (*self.tokenizer(response, add_special_tokens=False)["input_ids"], self._end_of_turn)

    def _render(self, example: Example) -> str:
        """The chat as text, up to where the assistant begins, with one token per image and per video."""
        messages, template = example.messages, None
        try:
            if isinstance(self.processor, TextProcessor):
                messages = [_joined(message) for message in messages]
            else:
                template = self.processor.chat_template
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise DataError(f"messages rejected by the chat template: {error}") from error

    def _with_videos(self, example: Example, text: str, videos: Sequence[Item]) -> str:
        """`text`, in which each video has a placeholder for every frame that the model sees."""
        processor = self.processor
        images, found = text.count(processor.image_token), text.count(processor.video_token)
        if (images, found) != (len(example.images), len(example.videos)):
            raise DataError(
                f"media and messages differ: {len(example.images)} images and {len(example.videos)} videos for "
                f"{images} image and {found} video placeholders; give one part per image and per video"
            )
        first, *rest = text.split(processor.video_token)
        expanded = [
            self._patcher.placeholders(video, item.pads) + part
            for video, item, part in zip(example.videos, videos, rest, strict=True)
        ]
        return "".join([first, *expanded])

    def _measured(self, example: Example) -> _Draft:
        """The text of the example and the sizes of its images and videos."""
        text = self._render(example)
        if isinstance(self.processor, TextProcessor):
            if example.images or example.videos:
                raise DataError(
                    f"media for a model that takes text alone: the example has {len(example.images)} images and "
                    f"{len(example.videos)} videos"
                )
            return _Draft(example, text, [], [])
        images, videos = self._patcher.measure(example)
        return _Draft(example, self._with_videos(example, text, videos), images, videos)

    def _expanded(self, draft: _Draft, token_ids: list[int]) -> tuple[tuple[int, ...], list[Item]]:
        """The prompt's tokens and its items in the order of their tokens. Checks the example, its pixels last."""
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in token_ids:
            raise DataError(f"characters unknown to the tokenizer: somewhere in {draft.text!r}")
        items = [*draft.images, *draft.videos]
        if not items:
            self._check_length(len(token_ids), items)
            return tuple(token_ids), items
        self._check_length(len(token_ids) + sum(item.pads * (item.tokens - 1) for item in items), items)
        decode(draft.example)
        # The items of each kind, as often as they have placeholders.
        pads = {
            self.processor.image_token_id: (item for item in draft.images),
            self.processor.video_token_id: (item for item in draft.videos for _ in range(item.pads)),
        }
        expanded: list[int] = []
        order: list[Item] = []
        for token in token_ids:
            if token not in pads:
                expanded.append(token)
                continue
            item = next(pads[token])
            expanded.extend([token] * item.tokens)
            if not order or order[-1] is not item:
                order.append(item)
        return tuple(expanded), order

    def _check_length(self, length: int, items: Sequence[Item]) -> None:
        if length > self.max_prompt_tokens:
            inside = sum(item.pads * item.tokens for item in items)
            raise DataError(
                f"prompt too long: {length} tokens, {inside} of them for {len(items)} images and videos; the limit "
                f"max_prompt_tokens is {self.max_prompt_tokens}: raise it or shorten the prompt"
            )


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its text in one piece: chat templates of models that take text alone skip a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return message
    if others := {part["type"] for part in content} - {"text"}:
        raise ValueError(f"parts of type {', '.join(sorted(others))} for a model that takes text alone")
    return {**message, "content": "".join(part["text"] for part in content)}


def load_processor(folder: str | os.PathLike[str]) -> Qwen3VLProcessor | TextProcessor:
    """The processor of a Hugging Face folder, for text alone where its model takes nothing else.

    `WeightsError` if there is none for what the model takes.
    """
    from copd_megatron.policy.platform import declare_torchvision_schemas
    from copd_megatron.rollout.hf_module import open_tokenizer

    if (Path(folder) / "config.json").is_file() and "vision_config" not in read_config(Path(folder)):
        return TextProcessor(open_tokenizer(Path(folder)))
    declare_torchvision_schemas()
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder}: no processor can be loaded from there: {error}") from error
    if not hasattr(processor, "image_processor"):
        raise WeightsError(f"{folder}: found a {type(processor).__name__}, expected a processor for text and images")
    videos = getattr(processor, "video_processor", None)
    if videos is not None and getattr(videos, "cap_pixels_per_frame", True) is None:
        # As Qwen's own code for videos does, and transformers by default from version 5.22 on.
        videos.cap_pixels_per_frame = True
    return processor


def stop_token_ids(folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All tokens that end a response: the folder's generation defaults and the tokenizer's own, in order of id."""
    from transformers import GenerationConfig

    try:
        declared = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        declared = None
    stops = {*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id} - {None}
    if not stops:
        raise WeightsError(f"{folder}: neither generation_config.json nor the tokenizer names a token that ends a text")
    return tuple(sorted(stops))
