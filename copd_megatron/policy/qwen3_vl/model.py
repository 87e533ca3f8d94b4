"""Qwen3-VL as a Megatron model: vision tower, language model, and what the pipeline schedule asks of them."""

from __future__ import annotations

from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from copd_megatron.policy.attention import AttentionPlan, PackedTokens
from copd_megatron.policy.packed import MicroBatch
from copd_megatron.policy.qwen3_vl.config import Qwen3VLSettings
from copd_megatron.policy.qwen3_vl.layers import DeepStackLayer, layer_spec
from copd_megatron.policy.qwen3_vl.rope import text_angles
from copd_megatron.policy.qwen3_vl.vision import VisionTower


class Qwen3VLModel(LanguageModule):
    """`Qwen3VLForConditionalGeneration`, or one pipeline stage of it.

    The first stage holds `embedding` and `vision`, each its share of `decoder`, the last one `output_layer` (without a
    weight of its own where that is tied to an `embedding` on the same stage).
    """

    family = "qwen3_vl"

    def __init__(self, settings: Qwen3VLSettings, pre_process: bool, post_process: bool) -> None:
        super().__init__(config=settings.text_config)
        self.settings = settings
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = settings.text.tied
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = None
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                self.config,
                settings.text.padded_vocab_size,
                max_sequence_length=0,
                position_embedding_type="none",
                tp_group=self.pg_collection.tp,
            )
            self.vision = VisionTower(settings.vision_config, settings.vision)
        self.decoder = TransformerBlock(
            self.config, layer_spec(self.config, DeepStackLayer), pre_process=pre_process, post_process=post_process
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                self.config.hidden_size,
                settings.text.padded_vocab_size,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=True,
                skip_weight_param_allocation=pre_process and settings.text.tied,
                tp_group=self.pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's hidden states [T, 1, H] as the next forward's input."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """Logits [R, V] of the response tokens on the last stage, hidden states [T, 1, H] on the others.

        Only the positions that predict a response token are projected onto the vocabulary.
        """
        hidden, features = self._embed(batch) if self.pre_process else (None, None)
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            context=features,
            packed_seq_params=self._packed(batch),
        )
        if not self.post_process:
            return hidden
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden.index_select(0, batch.logit_index), weight=weight)
        return logits[:, 0, : self.settings.text.vocab_size]

    def _packed(self, batch: MicroBatch) -> PackedTokens:
        text = self.settings.text
        angles = text_angles(batch.position_ids, self.config.kv_channels, text.rope_theta, text.mrope_section)
        cos, sin = (wave.to(self.config.params_dtype) for wave in (angles.cos(), angles.sin()))
        plan = AttentionPlan.of(batch.segments, batch.token_ids.device)
        return PackedTokens(plan, cos, sin, batch.visual_index)

    def _embed(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """Tokens [T, 1, H] with image tokens in their places, and DeepStack's features."""
        hidden = self.embedding(batch.token_ids.unsqueeze(0), position_ids=None)
        if batch.pixel_values is None:
            return hidden, None
        tokens, features = self.vision(batch.pixel_values, batch.grid_thw)
        return hidden.index_copy(0, batch.visual_index, tokens.unsqueeze(1).to(hidden.dtype)), features
