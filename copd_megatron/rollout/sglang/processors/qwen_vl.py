"""sglang's processor of the Qwen-VL families, which also takes images and videos as our processor made them."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.models.qwen3_vl import Qwen3VLForConditionalGeneration
from sglang.srt.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from copd_megatron.rollout.sglang import pixels


class PatchProcessor(QwenVLImageProcessor):
    """Items of `image_data` and `video_data` that begin with `pixels.SCHEME` go to the model as they are, at the places
    and positions that they name.

    The request's `input_ids` hold one image or video token per merged patch and stay what they are. Such a token that
    stands for no patch, as a policy may sample, is then a token like any other; tokens behind the prompt go on from its
    largest position. Everything else is left to sglang.

    sglang keeps what the vision tower made of an image or a video, by a hash of the pixels, also when the tower gets
    new weights. So the hash of ours includes the name of the weights, beside the grid and the time between frames.
    """

    models = [Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration]  # noqa: RUF012

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        if image_data:
            image_data = [_prepared(item, "image", input_text) for item in image_data]
        return await super().process_mm_data_async(image_data, input_text, request_obj, *arguments, **keywords)

    async def load_mm_data(self, prompt: Any, *arguments: Any, video_data: Any = None, **keywords: Any) -> Any:
        if video_data:
            video_data = [_prepared(item, "video", prompt) for item in video_data]
        return await super().load_mm_data(prompt, *arguments, video_data=video_data, **keywords)

    def _postprocess_mm_items_before_transport(self, mm_items: list[Any], *, images: list[Any] | None) -> list[Any]:
        for item in mm_items:
            facts = item.model_specific_data
            if weights := facts.pop("weights", None):
                seconds = facts.pop("seconds", None)
                grid = facts["image_grid_thw" if seconds is None else "video_grid_thw"]
                lasting = () if seconds is None else seconds.tolist()
                item.set_hash(pixels.identity(item.feature, grid, lasting, weights))
                for name in ("mrope_positions", "mrope_position_delta"):
                    facts.pop(name, None)
        return super()._postprocess_mm_items_before_transport(mm_items, images=images)


def _prepared(item: Any, kind: str, token_ids: Any) -> Any:
    """What sglang takes for patches that a processor has made, in the place of one of our items."""
    if not isinstance(item, str) or not item.startswith(pixels.SCHEME):
        return item
    patches = pixels.decode(item)
    prepared = {
        "format": "processor_output",
        "modality": kind,
        "weights": patches.weights,
        "offsets": torch.tensor(patches.offsets),
        "pixel_values" if kind == "image" else "pixel_values_videos": patches.pixel_values,
        f"{kind}_grid_thw": patches.grid_thw,
    }
    if kind == "video":
        prepared["seconds"] = torch.tensor(patches.seconds, dtype=torch.float64)
    if patches.positions is not None:
        following = len(token_ids) - patches.positions.shape[1]
        after = torch.arange(following) + patches.positions.max() + 1
        positions = torch.cat([patches.positions, after.expand(3, -1)], dim=1)
        prepared["mrope_positions"] = positions
        prepared["mrope_position_delta"] = positions.max() + 1 - len(token_ids)
    return prepared
