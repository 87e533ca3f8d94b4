"""One update of the policy: the gradient, the step, and what is reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_inputs import plain_inputs
from safetensors.torch import load_file
from tiny_policy import base_folder, gradients, make_samples, new_policy, toy_loss, weights_of, worst_difference

from copd_megatron.objectives.vocabulary import Vocabulary
from copd_megatron.policy.batching import NATIVE, Sample
from copd_megatron.policy.packed import Signals


def reference_model(base: Path):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(base))
    model.load_state_dict(load_file(base / "model.safetensors"))
    return model


def reference_logits(model, sample: Sample) -> torch.Tensor:
    """Logits [R, V] of one response, from transformers, with a copy of the prompt of its own."""
    prompt = sample.rollout.prompt
    inputs = plain_inputs(model, prompt.token_ids, prompt.media, sample.rollout.token_ids[:-1])
    return model(**inputs).logits[0, len(prompt.token_ids) - 1 :]


def reference_backward(model, samples: list[Sample]) -> float:
    """Autograd through transformers, sequence by sequence; returns the loss."""
    model.zero_grad()
    total = 0.0
    for sample in samples:
        count = sum(other.source == sample.source for other in samples)
        size = len(sample.rollout.token_ids)
        signals = Signals(
            source=torch.full((size,), sample.source),
            weight=torch.full((size,), 1 / (count * size)),
            advantage=torch.full((size,), sample.advantage),
            engine_logprobs=sample.rollout.logprobs,
            teacher_logprobs=None if sample.rollout.teacher is None else sample.rollout.teacher.logprobs,
        )
        loss, _ = toy_loss(reference_logits(model, sample), torch.tensor(sample.rollout.token_ids), signals)
        loss.backward()
        total += float(loss.detach())
    return total


def policy_gradient(
    logits: torch.Tensor, targets: torch.Tensor, signals: Signals, _: Vocabulary | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss to which a sample without advantage contributes nothing."""
    logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -(signals.weight * signals.advantage * logprobs).sum(), {}


def test_gradient_equals_autograd_through_transformers(base: Path) -> None:
    samples = make_samples(base, prompts=6, group=3, teachers=True)
    policy = new_policy(base, max_tokens=40, clip_grad=0)
    metrics = policy.update(samples, toy_loss)
    model = reference_model(base)
    expected_loss = reference_backward(model, samples)
    assert metrics["microbatches"] > 2
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert worst_difference(gradients(policy), expected) < 1e-4
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_gradient_does_not_depend_on_the_division_into_micro_batches(base: Path) -> None:
    samples = make_samples(base, prompts=5, group=4, teachers=True)
    found = []
    for max_tokens in (1000, 60, 25):
        policy = new_policy(base, max_tokens=max_tokens, clip_grad=0)
        metrics = policy.update(samples, toy_loss)
        found.append((metrics, gradients(policy)))
    assert [metrics["microbatches"] for metrics, _ in found] == sorted({m["microbatches"] for m, _ in found})
    for metrics, gradient in found[1:]:
        assert worst_difference(gradient, found[0][1]) < 1e-5
        for name in ("loss", "entropy", "cross", "grad_norm", "response_tokens"):
            assert metrics[name] == pytest.approx(found[0][0][name], rel=1e-5), name


def test_updates_follow_torch_adamw_with_clipping_and_undecayed_norms(base: Path) -> None:
    settings = {"lr": 1e-2, "weight_decay": 0.5, "clip_grad": 0.1, "warmup_steps": 4}
    policy = new_policy(base, max_tokens=60, **settings)
    model = reference_model(base)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    for step in range(3):
        samples = make_samples(base, prompts=4, group=2, seed=step)
        metrics = policy.update(samples, toy_loss)
        reference_backward(model, samples)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        for group in reference.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 4
        reference.step()
        assert metrics["lr"] == pytest.approx(1e-2 * (step + 1) / 4)
        assert metrics["grad_norm"] > 0.1
    assert policy.version == 3
    # Adam divides by the gradient's size: where that is near 0, rounding decides the direction of a step.
    difference = worst_difference(weights_of(policy), dict(model.named_parameters()))
    assert difference < 2e-3


def test_report_counts_tokens_and_leaves_out_what_was_not_measured(base: Path) -> None:
    samples = make_samples(base, prompts=2, group=3)
    metrics = new_policy(base).update(samples, toy_loss)
    prompts = {sample.rollout.prompt.uid: len(sample.rollout.prompt.token_ids) for sample in samples}
    responses = [len(sample.rollout.token_ids) for sample in samples]
    assert metrics["response_tokens"] == sum(responses)
    assert metrics["tokens"] == sum(prompts.values()) + sum(responses) - len(samples)
    assert metrics["tokens_saved"] == 2 * sum(prompts.values())
    assert metrics["skipped"] == 0
    assert "entropy" in metrics
    assert "cross" not in metrics


def test_logprobs_equal_transformers_in_the_order_of_the_samples(base: Path) -> None:
    samples = make_samples(base, prompts=5, group=3)
    policy, model = new_policy(base, max_tokens=40), reference_model(base)
    with torch.no_grad():
        for temperature in (1.0, 0.7):
            for sample, found in zip(samples, policy.logprobs(samples, temperature), strict=True):
                logprobs = (reference_logits(model, sample) / temperature).log_softmax(-1)
                expected = logprobs.gather(1, torch.tensor(sample.rollout.token_ids)[:, None])[:, 0]
                assert torch.allclose(found, expected, atol=1e-4)


def test_measuring_changes_nothing(base: Path) -> None:
    samples = make_samples(base, prompts=4, group=2)
    policy, undisturbed = new_policy(base), new_policy(base)
    first = policy.measure(samples, lambda *arguments: toy_loss(*arguments)[1])
    policy.logprobs(samples)
    metrics, expected = policy.update(samples, toy_loss), undisturbed.update(samples, toy_loss)
    assert metrics == expected
    assert first["entropy"] == pytest.approx(metrics["entropy"], rel=1e-6)
    assert worst_difference(weights_of(policy), weights_of(undisturbed)) == 0


def test_policy_takes_the_weights_of_another_folder(base: Path, tmp_path: Path) -> None:
    samples = make_samples(base, prompts=2, group=2)
    other = base_folder(tmp_path / "other", seed=1)
    policy = new_policy(base)
    before = torch.cat(policy.logprobs(samples))
    policy.load_hf(other)
    after = torch.cat(policy.logprobs(samples))
    assert not torch.allclose(before, after)
    assert torch.equal(after, torch.cat(new_policy(other).logprobs(samples)))


def test_bf16_policy_learns_with_fp32_master_weights(base: Path) -> None:
    policy = new_policy(base, precision="bf16", lr=1e-5)
    samples = make_samples(base, prompts=2, group=2)
    (optimizer,) = policy.optimizer.chained_optimizers
    masters = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
    before = [master.clone() for master in masters]
    metrics = policy.update(samples, toy_loss)
    assert metrics["skipped"] == 0
    assert all(parameter.dtype == torch.bfloat16 for parameter in policy.model.module.parameters())
    assert all(master.dtype == torch.float32 for master in masters)
    assert any(not torch.equal(old, new) for old, new in zip(before, masters, strict=True))


def test_update_without_samples_steps_with_a_zero_gradient(base: Path) -> None:
    policy = new_policy(base)
    metrics = policy.update([], toy_loss)
    assert (metrics["loss"], metrics["grad_norm"], metrics["microbatches"], policy.version) == (0, 0, 0, 1)


def test_samples_without_gradient_can_be_left_out_if_they_are_counted(base: Path) -> None:
    samples = make_samples(base, prompts=4, group=2)
    flat = [replace(sample, advantage=0.0) for sample in samples[:4]]
    found = []
    for chosen in (flat + samples[4:], samples[4:]):
        policy = new_policy(base, clip_grad=0)
        policy.update(chosen, policy_gradient, sequences={NATIVE: 8})
        found.append(gradients(policy))
    assert worst_difference(*found) < 1e-5


def test_old_logprobs_reach_the_loss(base: Path) -> None:
    samples = make_samples(base, prompts=3, group=2)
    policy = new_policy(base, max_tokens=30)
    old = policy.logprobs(samples)
    seen: list[torch.Tensor] = []

    def loss(
        logits: torch.Tensor, targets: torch.Tensor, signals: Signals, _: Vocabulary | None
    ) -> tuple[torch.Tensor, dict]:
        assert signals.old_logprobs is not None
        logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        seen.append((logprobs.detach() - signals.old_logprobs).abs().max())
        return (signals.weight * logprobs).sum(), {}

    policy.update(samples, loss, old_logprobs=old)
    assert len(seen) > 1
    assert max(seen) < 1e-5
