"""sglang's processor of the Qwen-VL families, which also takes images as our processor made them."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from sglang.srt.models.qwen3_vl import Qwen3VLForConditionalGeneration
from sglang.srt.models.qwen3_vl_moe import Qwen3VLMoeForConditionalGeneration
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor

from copd_megatron.rollout.sglang import pixels


class PatchProcessor(QwenVLImageProcessor):
    """Items of `image_data` that begin with `pixels.SCHEME` go to the model as they are, at the places that they name.

    The request's `input_ids` hold one image token per merged patch and stay what they are. An image token that is no
    image's, as a policy may sample, is then a token like any other. Everything else is left to sglang.

    sglang keeps what the vision tower made of an image, by a hash of the pixels, also when the tower gets new weights.
    So the hash of our images includes the name of the weights.
    """

    models = [Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration]  # noqa: RUF012

    async def process_mm_data_async(
        self, image_data: Any, input_text: Any, request_obj: Any, *arguments: Any, **keywords: Any
    ) -> Any:
        if image_data:
            image_data = [self._prepared(item) for item in image_data]
        return await super().process_mm_data_async(image_data, input_text, request_obj, *arguments, **keywords)

    def _prepared(self, item: Any) -> Any:
        if not isinstance(item, str) or not item.startswith(pixels.SCHEME):
            return item
        patches = pixels.decode(item)
        return {
            "format": "processor_output",
            "modality": "image",
            "weights": patches.weights,
            "pixel_values": patches.pixel_values,
            "image_grid_thw": patches.grid_thw,
            "offsets": torch.tensor(patches.offsets),
        }

    def _postprocess_mm_items_before_transport(self, mm_items: list[Any], *, images: list[Any] | None) -> list[Any]:
        for item in mm_items:
            if weights := item.model_specific_data.pop("weights", None):
                item.set_hash(pixels.identity(item.feature, weights))
        return super()._postprocess_mm_items_before_transport(mm_items, images=images)
