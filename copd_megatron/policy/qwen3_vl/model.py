"""A model as Megatron takes it: vision tower, language model, and what the pipeline schedule asks of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from copd_megatron.errors import DataError
from copd_megatron.objectives.vocabulary import Vocabulary
from copd_megatron.policy.attention import AttentionPlan, FeatureRows, PackedTokens
from copd_megatron.policy.linear import ColumnParallelLinear
from copd_megatron.policy.packed import MicroBatch
from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings
from copd_megatron.policy.qwen3_vl.layers import decoder_spec
from copd_megatron.policy.qwen3_vl.rope import text_angles
from copd_megatron.policy.qwen3_vl.vision import VisionTower
from copd_megatron.policy.qwen3_vl.vision_settings import VisionSettings, WindowSettings
from copd_megatron.policy.qwen3_vl.windowed import WindowedTower


class Qwen3VLModel(LanguageModule):
    """`Qwen3VLForConditionalGeneration`, its relatives with experts or without a vision tower, or one pipeline stage.

    The first stage holds `embedding` and `vision` (None in a model that takes text alone), each its share of
    `decoder`, the last one `output_layer` (without a weight of its own where that is tied to an `embedding` on the same
    stage). Between stages travel the hidden states and behind them, as more rows, the DeepStack features that layers of
    later stages add.
    """

    def __init__(
        self, settings: Qwen3VLSettings, pre_process: bool, post_process: bool, vp_stage: int | None = None
    ) -> None:
        super().__init__(config=settings.text_config)
        self.settings = settings
        self.family = settings.family
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = settings.text.tied
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        self.touch_all = False
        """Give every parameter a gradient in every backward pass, zero where it took no part."""
        self.stops_before_output_layer = False
        """Return hidden states [R, 1, H] in place of logits; `project` makes those of them."""
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                self.config,
                settings.text.padded_vocab_size,
                max_sequence_length=0,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,  # images are put in before
                tp_group=self.pg_collection.tp,
            )
            self.vision = _tower(settings)
        self.decoder = TransformerBlock(
            self.config,
            decoder_spec(self.config, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                self.config.hidden_size,
                settings.text.padded_vocab_size,
                # Its input is gathered before it is selected; that it has no experts spares a warning.
                config=replace(self.config, sequence_parallel=False, expert_model_parallel_size=1),
                init_method=self.config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and settings.text.tied,
                tp_group=self.pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The part of the vocabulary that this rank's logits cover; None for all of it."""
        group = self.pg_collection.tp
        if group.size() == 1:
            return None
        width = self.settings.text.padded_vocab_size // group.size()
        return Vocabulary(width * group.rank(), self.settings.text.vocab_size, group)

    @property
    def first_layer(self) -> int:
        """Number, from 0 and over all stages, of the first decoder layer of this one."""
        return int(self.decoder.layers[0].layer_number) - 1

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output as the next forward's input."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Logits [R, V] of the response tokens on the last stage, rows [T + features, 1, H] on the others.

        V is this rank's share, `vocabulary`. Only the positions that predict a response token are projected onto it.
        """
        hidden, features = self._embed(batch) if self.pre_process else self._received(batch)
        if not self.pre_process:
            self.decoder.set_input_tensor(hidden)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=self._added_here(features),
            packed_seq_params=self._packed(batch),
        )
        if not self.post_process:
            return self._with_features(hidden, features, batch.frame)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        hidden = hidden.index_select(0, batch.logit_index)
        return hidden if self.stops_before_output_layer else self.project(hidden)

    def project(self, hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits [R, V] of hidden states [R, 1, H], by default by the weight of this model's own output layer."""
        logits, _ = self.output_layer(hidden, weight=self.output_weight if weight is None else weight)
        start = 0 if self.vocabulary is None else self.vocabulary.start
        return logits[:, 0, : max(0, self.settings.text.vocab_size - start)]

    @property
    def output_weight(self) -> Tensor:
        """This rank's rows of the output layer [Vp, H], on the last stage."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight  # type: ignore[return-value]

    def _packed(self, batch: MicroBatch) -> PackedTokens:
        text = self.settings.text
        angles = text_angles(
            batch.position_ids, self.config.kv_channels, text.rope_theta, text.mrope_section, text.mrope_interleaved
        )
        cos, sin = (wave.to(self.config.params_dtype) for wave in (angles.cos(), angles.sin()))
        plan = AttentionPlan.of(batch.segments, batch.token_ids.device, batch.stripe)
        gather = _gather_stripes if batch.stripe.count > 1 else None
        return PackedTokens(plan, cos, sin, gather, self._feature_rows(batch))

    def _embed(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Tokens [T, 1, H] with image and video tokens in their places, and DeepStack's features."""
        hidden, features = self.embedding(batch.token_ids.unsqueeze(0), position_ids=None), None
        if batch.pixel_values is not None:
            if self.vision is None:
                raise DataError(f"the micro-batch has images or videos, but a {self.family!r} takes text alone")
            tokens, features = self.vision(batch.pixel_values, batch.grid_thw)
            if batch.visual_rows is not None:
                tokens = tokens.index_select(0, batch.visual_rows)
            hidden = hidden.index_copy(0, batch.visual_index, tokens.unsqueeze(1).to(hidden.dtype))
            features = None if features is None else features.to(hidden.dtype)
        elif self.touch_all and self.vision is not None:
            hidden = _Untouched.apply(hidden, *self.vision.parameters())
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
        return hidden, features

    # ------------------------------------------------------------------ DeepStack across stages

    def rows_between_stages(self, batch: MicroBatch) -> int:
        """Rows of the largest message that a stage sends for `batch`."""
        return self._tokens(batch) + self._taps * self._merged_patches(batch)

    @property
    def _taps(self) -> int:
        """In how many decoder layers DeepStack's features are added."""
        return 0 if self.settings.vision is None else len(self.settings.vision.deepstack_layers)

    def _tokens(self, batch: MicroBatch) -> int:
        """Tokens of `batch` that this rank keeps between attention and MLP."""
        return len(batch.token_ids) // (self.pg_collection.tp.size() if self.config.sequence_parallel else 1)

    def _merged_patches(self, batch: MicroBatch) -> int:
        if batch.grid_thw is None or self.settings.vision is None:
            return 0
        return int(batch.grid_thw.prod(1).sum()) // self.settings.vision.merge**2

    def _received(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """What the previous stage sent: hidden states, and the features that this stage and later ones add."""
        received: Tensor = self.decoder.input_tensor
        tokens, patches = self._tokens(batch), self._merged_patches(batch)
        left = max(0, self._taps - self.first_layer)
        if not left * patches:
            return received[:tokens], None
        features = received[tokens : tokens + left * patches]
        return received[:tokens], features.reshape(left, patches, received.shape[-1])

    def _added_here(self, features: Tensor | None) -> Tensor | None:
        """The features that layers of this stage add, if any."""
        here = None if features is None else features[: len(self.decoder.layers)]
        if here is None or not self.config.sequence_parallel:
            return here
        # Each rank adds its tokens' rows; the gradient of all rows is the sum over ranks.
        return copy_to_tensor_model_parallel_region(here)

    def _with_features(self, hidden: Tensor, features: Tensor | None, frame: int) -> Tensor:
        """`hidden`, behind it what later stages add, and zeros up to `frame` rows."""
        parts = [hidden]
        if features is not None and len(features) > len(self.decoder.layers):
            parts.append(features[len(self.decoder.layers) :].reshape(-1, 1, features.shape[-1]))
        if missing := max(0, frame - sum(map(len, parts))):
            parts.append(hidden.new_zeros(missing, *hidden.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else hidden

    def _feature_rows(self, batch: MicroBatch) -> FeatureRows | None:
        if batch.visual_index is None:
            return None
        index, rows = batch.visual_index, batch.visual_rows
        if self.config.sequence_parallel:
            group = self.pg_collection.tp
            tokens = len(batch.token_ids) // group.size()
            mine = (index // tokens == group.rank()).nonzero()[:, 0]
            rows = mine if rows is None else rows[mine]
            index = index[mine] - tokens * group.rank()
        return FeatureRows(index, rows, self.first_layer)


def _tower(settings: Qwen3VLSettings) -> VisionTower | WindowedTower | None:
    config, vision = settings.vision_config, settings.vision
    if config is not None and isinstance(vision, VisionSettings):
        return VisionTower(config, vision)
    if config is not None and isinstance(vision, WindowSettings):
        return WindowedTower(config, vision)
    return None


class _Untouched(torch.autograd.Function):
    """The first argument; all others get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _gather_stripes(values: Tensor) -> Tensor:
    """`values` [T, …] of every context parallel rank's tokens, in packed order: [T · ranks, …]. Its gradient is summed
    over the ranks."""
    group = parallel_state.get_context_parallel_group()
    gathered: Tensor = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=True, group=group)
    return gathered.unflatten(0, (group.size(), -1)).transpose(0, 1).flatten(0, 1)
