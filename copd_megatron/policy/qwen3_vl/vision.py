"""The vision tower: `Qwen3VLVisionModel` on megatron-core's layers.

Patches arrive from the processor in merge-block order: the `merge` × `merge` patches that become one token lie next to
each other. All images and videos of a micro-batch are packed; attention stays within a frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from copd_megatron.policy.attention import AttentionPlan, PackedTokens
from copd_megatron.policy.elementwise import RMSNorm
from copd_megatron.policy.linear import ColumnParallelLinear, RowParallelLinear
from copd_megatron.policy.packed import Segments
from copd_megatron.policy.qwen3_vl.layers import layer_spec
from copd_megatron.policy.qwen3_vl.rope import vision_angles
from copd_megatron.policy.qwen3_vl.vision_settings import TowerSettings, VisionSettings


@dataclass(frozen=True)
class PatchGrid:
    """Where each patch stands in its frame: `row`, `column` and the frame's `height`, `width`, int64 [patches]."""

    row: Tensor
    column: Tensor
    height: Tensor
    width: Tensor

    @staticmethod
    def of(grid_thw: Tensor, merge: int) -> PatchGrid:
        """Patches of images and videos with `grid_thw` int64 [items, 3], in merge-block order."""
        frames, height, width = grid_thw.unbind(1)
        count = frames * height * width
        start = torch.repeat_interleave(count.cumsum(0) - count, count)
        height, width = torch.repeat_interleave(height, count), torch.repeat_interleave(width, count)
        within = (torch.arange(len(start), device=start.device) - start) % (height * width)
        block, inside = within // merge**2, within % merge**2
        row = block // (width // merge) * merge + inside // merge
        column = block % (width // merge) * merge + inside % merge
        return PatchGrid(row, column, height, width)


def frame_sizes(grid_thw: Tensor) -> Tensor:
    """Patches of each frame of items with `grid_thw` int64 [items, 3]: int64 [frames]."""
    return torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])


def within(lengths: Tensor, angles: Tensor, hidden: Tensor) -> PackedTokens:
    """What layers need where patches attend to those of their own group: `lengths` int64 [groups] counts them, on the
    CPU; `angles` [patches, 1, dim] rotate them, in the number format and on the device of `hidden`."""
    nothing = torch.empty(0, dtype=torch.int64)
    plan = AttentionPlan.of(Segments(lengths, nothing, nothing, causal=False), hidden.device)
    return PackedTokens(plan, angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype))


class VisionBlock(TransformerBlock):
    """The tower's layers, which also give the states that DeepStack taps."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, packed: Sequence[PackedTokens], taps: tuple[int, ...] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        """`hidden_states` [patches, 1, H] after the last layer, and after each of the layers `taps` (from 0).

        `packed` has one entry per layer.
        """
        tapped = []
        recompute = self.config.recompute_granularity == "full" and self.training
        for index, layer in enumerate(self.layers):

            def run(hidden: Tensor, layer: torch.nn.Module = layer, own: PackedTokens = packed[index]) -> Tensor:
                output: Tensor = layer(hidden_states=hidden, attention_mask=None, packed_seq_params=own)[0]
                return output

            hidden_states = checkpoint(run, False, hidden_states) if recompute else run(hidden_states)
            if index in taps:
                tapped.append(hidden_states)
        return hidden_states, tapped


class PatchMerger(MegatronModule):
    """Joins the patches of a merge block into one token of the language model (`Qwen3VLVisionPatchMerger`).

    The last layer's merger normalises each patch; DeepStack's normalise the joined block (`after_join`).
    """

    def __init__(self, config: TransformerConfig, vision: TowerSettings, after_join: bool) -> None:
        super().__init__(config=config)
        self.block_features = config.hidden_size * vision.merge**2
        self.after_join = after_join
        width = self.block_features if after_join else config.hidden_size
        self.norm = RMSNorm(config, width) if config.normalization == "RMSNorm" else torch.nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(
            replace(
                config,
                hidden_size=vision.out_hidden_size,
                ffn_hidden_size=self.block_features,
                gated_linear_unit=False,
                activation_func=F.gelu,
                use_te_activation_func=False,
            ),
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            input_size=self.block_features,
            ffn_hidden_size=self.block_features,
            tp_group=get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Patches [patches, 1, H of the tower] to tokens [merged patches, H of the language model]."""
        joined = hidden_states.reshape(-1, self.block_features)
        joined = self.norm(joined) if self.after_join else self.norm(hidden_states).reshape(joined.shape)
        output, bias = self.mlp(joined)
        return output if bias is None else output + bias


class DeepStackMergers(MegatronModule):
    """One merger per tapped layer (`deepstack_merger_list`), as a module that knows how to save its shards."""

    def __init__(self, config: TransformerConfig, vision: VisionSettings) -> None:
        super().__init__(config=config)
        for number in range(len(vision.deepstack_layers)):
            self.add_module(str(number), PatchMerger(config, vision, after_join=True))

    def forward(self, tapped: list[Tensor]) -> Tensor | None:
        """States [patches, 1, H of the tower] of all taps to features [taps, merged patches, H], None without taps."""
        features = [merger(state) for merger, state in zip(self.children(), tapped, strict=True)]
        return torch.stack(features) if features else None


class VisionTower(MegatronModule):
    """`Qwen3VLVisionModel`: patch embedding, learned positions, layers, merger and DeepStack's mergers."""

    def __init__(self, config: TransformerConfig, vision: VisionSettings) -> None:
        super().__init__(config=config)
        self.vision = vision
        self.patch_embedding = torch.nn.Linear(vision.patch_features, config.hidden_size)
        self.position_embedding = torch.nn.Embedding(vision.position_grid**2, config.hidden_size)
        self.blocks = VisionBlock(config, layer_spec(config), post_layer_norm=False)
        self.merger = PatchMerger(config, vision, after_join=False)
        self.deepstack_mergers = DeepStackMergers(config, vision)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [merged patches, H of the language model] and DeepStack's features.

        `pixel_values` [patches, patch features]; `grid_thw` int64 [items, 3].
        """
        grid = PatchGrid.of(grid_thw, self.vision.merge)
        hidden = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)) + self._positions(grid)
        angles = vision_angles(grid.row, grid.column, self.config.kv_channels, self.vision.rope_theta)
        packed = [within(frame_sizes(grid_thw.cpu()), angles, hidden)] * self.config.num_layers
        hidden, tapped = self.blocks(hidden.unsqueeze(1), packed, self.vision.deepstack_layers)
        return self.merger(hidden), self.deepstack_mergers(tapped)

    def _positions(self, grid: PatchGrid) -> Tensor:
        """The learned square of positions, interpolated to each frame's size: [patches, H]."""
        side = self.vision.position_grid
        taps, weights = zip(
            *(_neighbours(at, size, side) for at, size in ((grid.row, grid.height), (grid.column, grid.width))),
            strict=True,
        )
        index = (taps[0][:, :, None] * side + taps[1][:, None, :]).flatten(1)
        weight = (weights[0][:, :, None] * weights[1][:, None, :]).flatten(1)
        embedding = self.position_embedding(index)
        return (embedding * weight[:, :, None].to(embedding.dtype)).sum(1)


def _neighbours(at: Tensor, size: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The two grid lines (of `side`) beside each position on an axis of `size`, first and last on the rim, and their
    weights: int64 and float32 [patches, 2]."""
    exact = at.float() * (side - 1) / (size - 1).clamp(min=1)
    below = exact.floor()
    above_weight = exact - below
    lines = torch.stack([below, below + 1], dim=1).long().clamp(max=side - 1)
    return lines, torch.stack([1 - above_weight, above_weight], dim=1)
