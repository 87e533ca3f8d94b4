"""From an `Example` to a `Prompt`: chat template, tokens, one image-pad token per merged patch, pixels.

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
from PIL import Image

from copd_megatron.data.example import Example
from copd_megatron.errors import DataError, WeightsError
from copd_megatron.rollout.types import Media, Prompt
from copd_megatron.weights.hf import read_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLProcessor

END_OF_TURN = "<|im_end|>"

STACKED_PIXELS = 1 << 18
"""Up to this many pixels in a batch, pictures of equal size are processed as one tensor; above, that gains nothing."""


class Refusal(NamedTuple):
    """An example that cannot become a prompt; `reason` is the kind of fault, a colon, and the details."""

    uid: str
    reason: str


@dataclass(frozen=True)
class _Draft:
    """A prompt whose pixels are still to be processed; `patches` counts them, image by image, before merging."""

    example: Example
    text: str
    token_ids: tuple[int, ...]
    patches: list[int]


@dataclass(frozen=True)
class TextProcessor:
    """What a model that takes text alone has in the place of a processor."""

    tokenizer: PreTrainedTokenizerBase


class PromptBuilder:
    """Turns examples into prompts of at most `max_prompt_tokens` tokens."""

    def __init__(self, processor: Qwen3VLProcessor | TextProcessor, max_prompt_tokens: int) -> None:
        self.processor: Any = processor
        self.tokenizer: PreTrainedTokenizerBase = processor.tokenizer
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
        without an image or the reverse, an image that cannot be used, any image where the model takes text alone, a
        prompt beyond `max_prompt_tokens`.
        """
        refused: list[Refusal] = []
        rendered: list[tuple[Example, str]] = []
        for example in examples:
            try:
                rendered.append((example, self._render(example)))
            except DataError as error:
                refused.append(Refusal(example.uid, str(error)))
        tokens = self.tokenizer([text for _, text in rendered])["input_ids"] if rendered else []
        drafts: list[_Draft] = []
        for (example, text), token_ids in zip(rendered, tokens, strict=True):
            try:
                drafts.append(self._draft(example, text, token_ids))
            except DataError as error:
                refused.append(Refusal(example.uid, str(error)))
        prompts = [
            Prompt(
                uid=draft.example.uid,
                capability=capability,
                token_ids=draft.token_ids,
                answer=draft.example.answer,
                verifier=draft.example.verifier,
                text=draft.text,
                media=media,
            )
            for draft, media in zip(drafts, self._process(drafts), strict=True)
        ]
        return prompts, refused

    def response_token_ids(self, response: str) -> tuple[int, ...]:
        """The tokens of an assistant's turn as the policy should produce it: `response`, then `<|im_end|>`."""
        return (*self.tokenizer(response, add_special_tokens=False)["input_ids"], self._end_of_turn)

    def _render(self, example: Example) -> str:
        """The chat as text, up to where the assistant begins, with one image-pad token per image."""
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

    def _draft(self, example: Example, text: str, token_ids: list[int]) -> _Draft:
        """Check the example, its pixels last, and expand the image-pad tokens."""
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in token_ids:
            raise DataError(f"characters unknown to the tokenizer: somewhere in {text!r}")
        pad, merged = None, 1
        if isinstance(self.processor, TextProcessor):
            if example.images:
                raise DataError(f"images for a model that takes text alone: the example has {len(example.images)}")
        else:
            pad, merged = self.processor.image_token_id, self.processor.image_processor.merge_size**2
            if token_ids.count(pad) != len(example.images) or self.processor.video_token_id in token_ids:
                raise DataError(
                    f"images and messages differ: {len(example.images)} images for {token_ids.count(pad)} image and "
                    f"{token_ids.count(self.processor.video_token_id)} video placeholders; give one image part per "
                    "image"
                )
        patches = [self._patches(image, number) for number, image in enumerate(example.images, 1)]
        length = len(token_ids) + sum(patches) // merged - len(patches)
        if length > self.max_prompt_tokens:
            raise DataError(
                f"prompt too long: {length} tokens, {sum(patches) // merged} of them for {len(patches)} images; "
                f"the limit max_prompt_tokens is {self.max_prompt_tokens}: raise it or shorten the prompt"
            )
        for number, image in enumerate(example.images, 1):
            _decode(image, number)
        counts = iter(patches)
        expanded: list[int] = []
        for token in token_ids:
            expanded.extend([token] * (next(counts) // merged) if token == pad else [token])
        return _Draft(example, text, tuple(expanded), patches)

    def _patches(self, image: Image.Image, number: int) -> int:
        """Patches that the image processor will cut the image into; the size is known before it is decoded."""
        try:
            return self.processor.image_processor.get_number_of_image_patches(image.height, image.width)
        except ValueError as error:
            raise DataError(
                f"image of unusable size: image {number}, {image.width} x {image.height}, {error}"
            ) from error

    def _process(self, drafts: list[_Draft]) -> list[Media | None]:
        """The pixels of all drafts in one call, cut up again; None for a draft without images."""
        images = [image for draft in drafts for image in draft.example.images]
        if not images:
            return [None] * len(drafts)
        pixels = sum(image.width * image.height for image in images)
        processed = self.processor.image_processor(
            images=images, return_tensors="pt", disable_grouping=pixels > STACKED_PIXELS
        )
        values = processed["pixel_values"].split([sum(draft.patches) for draft in drafts])
        grids = processed["image_grid_thw"].split([len(draft.patches) for draft in drafts])
        return [
            # Copies, so that a prompt that is kept or sent to another process does not take its batch along.
            Media(value.clone(), grid.clone()) if draft.patches else None
            for draft, value, grid in zip(drafts, values, grids, strict=True)
        ]


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    """`message` with its text in one piece: chat templates of models that take text alone skip a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return message
    if others := {part["type"] for part in content} - {"text"}:
        raise ValueError(f"parts of type {', '.join(sorted(others))} for a model that takes text alone")
    return {**message, "content": "".join(part["text"] for part in content)}


def _decode(image: Image.Image, number: int) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"image cannot be decoded: image {number}, {error}") from error


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
