from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from copd_megatron.policy.platform import declare_torchvision_schemas
from copd_megatron.rollout.decoder import Decoder, attend
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


def hidden_states(model: Any, decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Of `tokens` [B, S], one column after another through the decoder; the first two by the model."""
    cache = roomy_cache(len(model.layers), 0)
    start = model(input_ids=tokens[:, :2], past_key_values=cache, use_cache=True).last_hidden_state
    cos, sin = decoder.angles(torch.arange(tokens.shape[1]).expand(len(tokens), -1))
    steps = [
        decoder.step(tokens[:, place], (cos[:, place], sin[:, place]), cache, None)
        for place in range(2, tokens.shape[1])
    ]
    return torch.cat([start, torch.stack(steps, dim=1)], dim=1)


@pytest.mark.parametrize(
    "build",
    [language_model, partial(language_model, attention_bias=True), model_with_experts],
    ids=["plain", "biased", "experts"],
)
def test_steps_are_those_of_the_model_before_and_after_new_weights(build: Callable[[], Any]) -> None:
    model = build()
    decoder = Decoder(model)
    tokens = torch.randint(40, (3, 40), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(hidden_states(model, decoder, tokens), before, atol=2e-5, rtol=0)
    for parameter in model.parameters():
        parameter.copy_(parameter * 0.7)
    after = model(input_ids=tokens).last_hidden_state
    assert float((after - before).abs().max()) > 0.1
    torch.testing.assert_close(hidden_states(model, decoder, tokens), after, atol=2e-5, rtol=0)


def test_names_and_shapes_of_the_models_weights_stay() -> None:
    model, untouched = language_model(), language_model()
    Decoder(model)
    ours, theirs = dict(model.named_parameters()), dict(untouched.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("length", [3, 16, 21])
def test_attention_is_that_of_torch(length: int) -> None:
    draw = torch.Generator().manual_seed(length)
    query = torch.randn(2, 6, 8, generator=draw)
    keys, values = torch.randn(2, 2, 2, length, 8, generator=draw)
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :2] = False
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], keys, values, mask[:, None, None], scale=0.3, enable_gqa=True
    )
    bias = torch.zeros(2, 1, 1, length).masked_fill_(~mask[:, None, None], -torch.inf)
    torch.testing.assert_close(attend(query, keys, values, 0.3, bias), expected.flatten(1))
