"""From images and videos to patches, as the Hugging Face processor cuts them.

Every item can be measured before it is decoded, and many small ones are processed in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from PIL import Image

from copd_megatron.data.example import Example, Video
from copd_megatron.errors import DataError
from copd_megatron.rollout.types import Media

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor
    from transformers.video_utils import VideoMetadata

STACKED_PIXELS = 1 << 18
"""Up to this many pixels in a batch, items of equal size are processed as one tensor; above, that gains nothing."""

Source = TypeVar("Source", Image.Image, Video)


@dataclass(frozen=True)
class Item:
    """An image or a video that is still to be processed. It has `pads` placeholders in the prompt, one per image and
    one per frame that the model sees of a video; each becomes `tokens` tokens of `patches // pads` patches."""

    source: Image.Image | Video
    pads: int
    tokens: int
    patches: int


class Patcher:
    """What a processor makes of images and videos."""

    def __init__(self, processor: Qwen3VLProcessor) -> None:
        self.processor: Any = processor

    def measure(self, example: Example) -> tuple[list[Item], list[Item]]:
        """The images and the videos of `example`, of which only the sizes are looked at. Raises DataError for an item
        of a size that cannot be used."""
        images = [self._image(image, number) for number, image in enumerate(example.images, 1)]
        videos = [self._video(video, number) for number, video in enumerate(example.videos, 1)]
        return images, videos

    def placeholders(self, video: Video, pads: int) -> str:
        """The text that stands for a video in a prompt, with one video token for each frame that the model sees:
        between them are the moments of frames where the model reads them."""
        side = self.processor.video_processor.merge_size
        inputs = {"video_grid_thw": torch.tensor([[pads, side, side]]), "video_metadata": [_metadata(video)]}
        text: str = self.processor.replace_video_token(inputs, video_idx=0)
        return text

    def process(self, prompts: Sequence[Sequence[Item]]) -> list[Media | None]:
        """The pixels of all items of all `prompts`, one prompt's in one `Media`; None for a prompt without items."""
        items = [item for prompt in prompts for item in prompt]
        images = iter(self._images([item for item in items if isinstance(item.source, Image.Image)]))
        videos = iter(self._videos([item for item in items if isinstance(item.source, Video)]))
        made: list[Media | None] = []
        for prompt in prompts:
            parts = [next(videos if isinstance(item.source, Video) else images) for item in prompt]
            lasting = {
                number: self.processor.video_processor.temporal_patch_size / _metadata(item.source).sampled_fps
                for number, item in enumerate(prompt)
                if isinstance(item.source, Video)
            }
            # Joining copies, so that a prompt that is kept or sent to another process does not take its batch along.
            pixels, grids = (torch.cat(tensors) for tensors in zip(*parts, strict=True)) if parts else (None, None)
            media = None
            if pixels is not None and grids is not None:
                media = Media(pixels, grids, tuple(lasting), tuple(lasting.values()))
            made.append(media)
        return made

    def _image(self, image: Image.Image, number: int) -> Item:
        processor = self.processor.image_processor
        try:
            patches = processor.get_number_of_image_patches(image.height, image.width)
        except ValueError as error:
            size = f"{image.width} x {image.height}"
            raise DataError(f"image of unusable size: image {number}, {size}, {error}") from error
        return Item(image, 1, patches // processor.merge_size**2, patches)

    def _video(self, video: Video, number: int) -> Item:
        processor = self.processor.video_processor
        sizes = {frame.size for frame in video.frames}
        if len(sizes) != 1 or len(video.indices) != len(video.frames):
            raise DataError(
                f"video of unusable size: video {number}, {len(video.frames)} frames of {len(sizes)} sizes with "
                f"{len(video.indices)} indices; a video has at least one frame, all of one size, with one index each"
            )
        ((width, height),) = sizes
        try:
            patches = processor.get_num_of_video_patches(len(video.frames), height, width, {})
        except ValueError as error:
            size = f"{len(video.frames)} frames of {width} x {height}"
            raise DataError(f"video of unusable size: video {number}, {size}, {error}") from error
        pads = -(-len(video.frames) // processor.temporal_patch_size)
        return Item(video, pads, patches // pads // processor.merge_size**2, patches)

    def _images(self, items: Sequence[Item]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pixels and grid of each image."""
        if not items:
            return
        images = [item.source for item in items if isinstance(item.source, Image.Image)]
        many = sum(image.width * image.height for image in images) > STACKED_PIXELS
        done = self.processor.image_processor(images=images, return_tensors="pt", disable_grouping=many)
        yield from _cut(items, done["pixel_values"], done["image_grid_thw"])

    def _videos(self, items: Sequence[Item]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pixels and grid of each video."""
        videos = [item.source for item in items if isinstance(item.source, Video)]
        pixels = sum(len(video.frames) * video.frames[0].width * video.frames[0].height for video in videos)
        at_once = len(items) if pixels <= STACKED_PIXELS else 1
        for start in range(0, len(items), max(1, at_once)):
            part = slice(start, start + at_once)
            done = self.processor.video_processor(
                videos=[[frame.convert("RGB") for frame in video.frames] for video in videos[part]],
                video_metadata=[_metadata(video) for video in videos[part]],
                do_sample_frames=False,
                return_tensors="pt",
            )
            yield from _cut(items[part], done["pixel_values_videos"], done["video_grid_thw"])


def _cut(
    items: Sequence[Item], pixels: torch.Tensor, grids: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What belongs to each item."""
    found, expected = grids.prod(1).tolist(), [item.patches for item in items]
    if found != expected:
        raise DataError(
            f"the processor made {found} patches of items of which it had announced {expected}; if it has "
            "cap_pixels_per_frame, set it to false in preprocessor_config.json"
        )
    yield from zip(pixels.split(expected), grids.split(1), strict=True)


def decode(example: Example) -> None:
    """Decode the images and frames of `example`. Raises DataError for one that is damaged."""
    for number, image in enumerate(example.images, 1):
        _load(image, f"image cannot be decoded: image {number}")
    for number, video in enumerate(example.videos, 1):
        for frame_number, frame in enumerate(video.frames, 1):
            _load(frame, f"video cannot be decoded: video {number}, frame {frame_number}")


def _load(image: Image.Image, what: str) -> None:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{what}, {error}") from error


def _metadata(video: Video) -> VideoMetadata:
    from transformers.video_utils import VideoMetadata

    # The processor may add to the list of indices: it gets one of its own.
    return VideoMetadata(total_num_frames=video.total, fps=video.fps, frames_indices=list(video.indices))
