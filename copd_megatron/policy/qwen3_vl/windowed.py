"""The vision tower of Qwen2.5-VL, `Qwen2_5_VisionTransformerPretrainedModel`, on megatron-core's layers.

Merged patches are put in order window by window. In most layers a window attends to itself alone, in some a whole
frame does, which windows never cross; at the end the tokens are put back in their items' order.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from copd_megatron.policy.qwen3_vl.layers import layer_spec
from copd_megatron.policy.qwen3_vl.rope import vision_angles
from copd_megatron.policy.qwen3_vl.vision import PatchGrid, PatchMerger, VisionBlock, frame_sizes, within
from copd_megatron.policy.qwen3_vl.vision_settings import WindowSettings


def windows(grid_thw: Tensor, merge: int, window: int) -> tuple[Tensor, Tensor]:
    """The merged patches of items with `grid_thw` int64 [items, 3] in order of their windows, int64 [merged patches],
    and how many each window has, int64 [windows].

    A window has `window` × `window` merged patches of a frame, and fewer at the right and at the lower rim.
    """
    merged = torch.stack([grid_thw[:, 0], grid_thw[:, 1] // merge, grid_thw[:, 2] // merge], dim=1)
    place = PatchGrid.of(merged, 1)
    _, height, width = torch.repeat_interleave(merged, merged[:, 0], dim=0).unbind(1)
    down, across = -(-height // window), -(-width // window)
    first = (down * across).cumsum(0) - down * across
    frame = torch.repeat_interleave(torch.arange(len(height)), height * width)
    number = first[frame] + place.row // window * across[frame] + place.column // window
    return number.argsort(stable=True), number.bincount()


class WindowedTower(MegatronModule):
    """Patch embedding, layers and merger."""

    def __init__(self, config: TransformerConfig, vision: WindowSettings) -> None:
        super().__init__(config=config)
        self.vision = vision
        self.patch_embedding = torch.nn.Linear(vision.patch_features, config.hidden_size, bias=False)
        self.blocks = VisionBlock(config, layer_spec(config), post_layer_norm=False)
        self.merger = PatchMerger(config, vision, after_join=False)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, None]:
        """Tokens [merged patches, H of the language model], and that there are no features for DeepStack.

        `pixel_values` [patches, patch features]; `grid_thw` int64 [items, 3].
        """
        device, vision = pixel_values.device, self.vision
        sizes, block = grid_thw.cpu(), vision.merge**2
        order, counts = windows(sizes, vision.merge, vision.window)
        patches = (order[:, None] * block + torch.arange(block)).flatten().to(device)
        grid = PatchGrid.of(grid_thw, vision.merge)
        angles = vision_angles(grid.row, grid.column, self.config.kv_channels, vision.rope_theta)[patches]
        hidden = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).index_select(0, patches)
        frames, parts = within(frame_sizes(sizes), angles, hidden), within(counts * block, angles, hidden)
        packed = [frames if layer in vision.full_layers else parts for layer in range(self.config.num_layers)]
        hidden, _ = self.blocks(hidden.unsqueeze(1), packed)
        return self.merger(hidden).index_select(0, order.argsort().to(device)), None
