from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from copd_megatron.rollout.sampling import check_sampling, choose, likeliest, random_numbers, token_logprobs
from copd_megatron.rollout.types import Sampling

SAMPLING = Sampling(max_new_tokens=4, stop_token_ids=(1,))


def frequencies(logits: torch.Tensor, sampling: Sampling, draws: int = 40_000) -> torch.Tensor:
    uniform = random_numbers(0, draws, 1)[:, 0]
    tokens, _ = choose(logits.expand(draws, -1), uniform, sampling)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


def test_tokens_are_drawn_with_the_probabilities_of_the_tempered_logits() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        found = frequencies(logits, replace(SAMPLING, temperature=temperature))
        torch.testing.assert_close(found, expected, atol=0.01, rtol=0)


def test_temperature_zero_takes_the_likeliest_whatever_the_random_number() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]]).expand(3, -1)
    tokens, logprobs = choose(logits, torch.tensor([0.0, 0.5, 0.999]).double(), replace(SAMPLING, temperature=0.0))
    assert tokens.tolist() == [1, 1, 1]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 1])


def test_top_k_draws_among_the_k_likeliest_in_their_proportions() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0])
    kept = torch.tensor([-torch.inf, 2.0, -torch.inf, 1.0])
    found = frequencies(logits, replace(SAMPLING, top_k=2))
    torch.testing.assert_close(found, kept.softmax(-1), atol=0.01, rtol=0)
    assert found[[0, 2]].sum() == 0


def test_top_p_draws_among_the_fewest_tokens_that_hold_p() -> None:
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3]).log()
    for top_p, kept in ((0.5, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.95, {0, 1, 2, 3})):
        found = frequencies(logits, replace(SAMPLING, top_p=top_p))
        assert set(found.nonzero()[:, 0].tolist()) == kept, top_p


def test_top_p_counts_the_probability_that_top_k_has_left() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the three likeliest, renormalised to .44, .33 and .22, two hold 0.75; of all four it takes three.
    found = frequencies(logits, replace(SAMPLING, top_k=3, top_p=0.75))
    assert set(found.nonzero()[:, 0].tolist()) == {0, 1}


def test_narrowed_choices_agree_with_those_of_transformers() -> None:
    from copd_megatron.policy.platform import declare_torchvision_schemas

    declare_torchvision_schemas()
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(64, 53, generator=torch.Generator().manual_seed(0)) * 3
    theirs = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(10)(None, logits)).softmax(-1)
    uniform = random_numbers(1, 64, 200)
    sampling = replace(SAMPLING, top_k=10, top_p=0.8)
    ours = torch.stack([choose(logits, uniform[:, draw], sampling)[0] for draw in range(200)], dim=1)
    assert (theirs.gather(1, ours) > 0).all()
    reached = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ours, torch.ones_like(ours, dtype=torch.bool))
    assert reached[theirs > 0.05].all()


def test_pitfall_06_narrowed_sampling_keeps_full_vocabulary_logprobs() -> None:
    logits = torch.randn(256, 53, generator=torch.Generator().manual_seed(0))
    uniform = random_numbers(0, 256, 1)[:, 0]
    for sampling in (
        replace(SAMPLING, top_k=3),
        replace(SAMPLING, top_p=0.5),
        replace(SAMPLING, top_k=5, top_p=0.7, temperature=0.7),
    ):
        tokens, logprobs = choose(logits, uniform, sampling)
        full = (logits / sampling.temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(logprobs, full)


def test_extreme_random_numbers_never_draw_an_excluded_token() -> None:
    logits = torch.tensor([[-1e9, 0.0, -1e9], [0.0, -1e9, -1e9], [0.0, 0.0, -1e9]])
    for uniform in (0.0, 1 - 2**-53):
        tokens, _ = choose(logits, torch.full((3,), uniform, dtype=torch.float64), SAMPLING)
        assert token_logprobs(logits, 1.0).gather(1, tokens[:, None]).min() > -1


@pytest.mark.parametrize(
    ("setting", "value"),
    [("n", 0), ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1)],
)
def test_meaningless_settings_are_named(setting: str, value: Any) -> None:
    changed: dict[str, Any] = {setting: value}
    with pytest.raises(ValueError, match=rf"sampling\.{setting} is {value}, expected"):
        check_sampling(replace(SAMPLING, **changed))


@pytest.mark.parametrize("vocabulary", [7, 64, 2000])
@pytest.mark.parametrize("k", [1, 5, 7])
def test_likeliest_tokens_come_first(vocabulary: int, k: int) -> None:
    logprobs = (torch.randn(50, vocabulary, generator=torch.Generator().manual_seed(k)) * 5).log_softmax(-1)
    ids, values = likeliest(logprobs, k)
    ranked, order = torch.sort(logprobs, dim=-1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :k])
    assert torch.equal(values, ranked[:, :k])


def test_among_equals_the_lower_id_is_the_likelier_from_certain_to_impossible() -> None:
    logprobs = torch.tensor([[-torch.inf, 0.0, -1e-40, -1.0, -torch.inf, -1.0, -3e38]])
    ids, values = likeliest(logprobs, 7)
    assert ids.tolist() == [[1, 2, 3, 5, 6, 0, 4]]
    assert torch.equal(values, logprobs[:, ids[0]])
