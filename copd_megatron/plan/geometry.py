"""The sizes of a model that memory and time depend on, as plain numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Tower:
    """A vision tower. `cost_patch`, `cost_pair`: operations of a forward pass per patch and per pair of a frame."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    gated: bool
    merge: int
    patch_features: int
    taps: int
    cost_patch: float
    cost_pair: float

    @property
    def joined(self) -> int:
        """Features of the patches that become one token."""
        return self.hidden * self.merge**2


@dataclass(frozen=True)
class Geometry:
    """A language model and its tower (None: text alone).

    `query`, `key` are the features of all heads and of all groups; `vocab` is padded for tensor parallelism.
    `cost_token`, `cost_pair`: operations of a forward pass per token, without the output layer, and per pair of tokens
    that attend to each other (`policy.balance.Cost`).
    """

    layers: int
    hidden: int
    query: int
    key: int
    heads: int
    groups: int
    ffn: int
    experts: int
    chosen: int
    expert_ffn: int
    sparse_layers: int
    vocab: int
    cost_token: float
    cost_pair: float
    tower: Tower | None

    @staticmethod
    def of(plain: dict[str, Any]) -> Geometry:
        """From what `described` gave."""
        tower = plain["tower"]
        return Geometry(**{**plain, "tower": None if tower is None else Tower(**tower)})

    @staticmethod
    def described(settings: Any) -> dict[str, Any]:
        """Of a `Qwen3VLSettings`, as plain data."""
        from copd_megatron.policy.balance import Cost
        from copd_megatron.policy.qwen3_vl.moe import has_experts

        text, vision, own, cost = settings.text_config, settings.vision_config, settings.vision, Cost.of(settings)
        tower = None
        if vision is not None:
            tower = Tower(
                layers=vision.num_layers,
                hidden=vision.hidden_size,
                heads=vision.num_attention_heads,
                ffn=vision.ffn_hidden_size,
                gated=vision.gated_linear_unit,
                merge=own.merge,
                patch_features=own.patch_features,
                taps=len(own.deepstack_layers),
                cost_patch=cost.patch,
                cost_pair=cost.patch_pair,
            )
        return asdict(
            Geometry(
                layers=text.num_layers,
                hidden=text.hidden_size,
                query=text.num_attention_heads * text.kv_channels,
                key=text.num_query_groups * text.kv_channels,
                heads=text.num_attention_heads,
                groups=text.num_query_groups,
                ffn=text.ffn_hidden_size,
                experts=text.num_moe_experts or 0,
                chosen=text.moe_router_topk if text.num_moe_experts else 0,
                expert_ffn=text.moe_ffn_hidden_size if text.num_moe_experts else 0,
                sparse_layers=sum(has_experts(text, layer) for layer in range(text.num_layers)),
                vocab=settings.text.padded_vocab_size,
                cost_token=cost.token,
                cost_pair=cost.pair,
                tower=tower,
            )
        )
