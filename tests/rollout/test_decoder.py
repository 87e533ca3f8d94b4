from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.rollout.decoder import FEW_KEYS, Decoder, attend, seen_columns
from copd_megatron.rollout.kv_cache import roomy_cache


def language_model(**options: Any) -> Any:
    declare_torchvision_schemas()
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    config = Qwen3VLTextConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        **options,
    )
    torch.manual_seed(0)
    model = Qwen3VLTextModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which would hide a mistake
        parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


def model_with_experts() -> Any:
    """Of two layers the second has experts."""
    declare_torchvision_schemas()
    from transformers.models.qwen3_vl_moe.configuration_qwen3_vl_moe import Qwen3VLMoeTextConfig
    from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextModel

    like = language_model().config.to_dict()
    sparse = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    config = Qwen3VLMoeTextConfig(**{name: like[name] for name in like if name != "model_type"} | sparse)
    torch.manual_seed(0)
    model = Qwen3VLMoeTextModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


def hidden_states(model: Any, decoder: Decoder, tokens: torch.Tensor, at_once: int) -> torch.Tensor:
    """Of `tokens` [B, S], so many columns after another through the decoder; the first two by the model."""
    cache = roomy_cache(len(model.layers), 0)
    states = [model(input_ids=tokens[:, :2], past_key_values=cache, use_cache=True).last_hidden_state]
    cos, sin = decoder.angles(torch.arange(tokens.shape[1]).expand(len(tokens), -1))
    for start in range(2, tokens.shape[1], at_once):
        part = slice(start, start + at_once)
        states.append(decoder.extend(tokens[:, part], (cos[:, part], sin[:, part]), cache, None))
    return torch.cat(states, dim=1)


@pytest.mark.parametrize(
    "build",
    [language_model, partial(language_model, attention_bias=True), model_with_experts],
    ids=["plain", "biased", "experts"],
)
@pytest.mark.parametrize(("at_once", "length"), [(1, 40), (7, 40), (FEW_KEYS // 2, FEW_KEYS + 30)])
def test_hidden_states_are_the_models_before_and_after_new_weights(
    build: Callable[[], Any], at_once: int, length: int
) -> None:
    model = build()
    decoder = Decoder(model)
    tokens = torch.randint(40, (3, length), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(hidden_states(model, decoder, tokens, at_once), before, atol=5e-5, rtol=0)
    for parameter in model.parameters():
        parameter.copy_(parameter * 0.7)
    after = model(input_ids=tokens).last_hidden_state
    assert float((after - before).abs().max()) > 0.1
    torch.testing.assert_close(hidden_states(model, decoder, tokens, at_once), after, atol=5e-5, rtol=0)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("length", [3, 16, 21, FEW_KEYS + 1])
def test_attention_is_that_of_torch_for_columns_that_are_real_and_not_later(length: int, new: int) -> None:
    draw = torch.Generator().manual_seed(length)
    query = torch.randn(2, new, 6, 8, generator=draw)
    keys, values = torch.randn(2, 2, 2, length, 8, generator=draw)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, : length - new] = False
    allowed = torch.ones(new, length).tril(length - new).bool() & mask[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, allowed[:, None], scale=0.3, enable_gqa=True
    )
    found = attend(query, keys, values, 0.3, seen_columns(new, length, mask, query.device))
    torch.testing.assert_close(found.view(2, new, 48), expected.transpose(1, 2).flatten(2))


def test_every_column_is_seen_by_one_query_without_padding() -> None:
    assert seen_columns(1, 7, None, torch.device("cpu")) is None
