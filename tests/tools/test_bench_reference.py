"""The comparison with transformers compares the same computation, or refuses to time it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import bench_reference
import pytest
import torch
from bench_model import Shape, cross_entropy, make_samples, model_config, write_model

from copd_megatron.policy import layout
from copd_megatron.policy.packed import Signals

SHAPE = Shape(hidden=32, layers=2, heads=4, groups=2, head_dim=16, mlp=48, vocabulary=64)


@pytest.fixture
def alone() -> Iterator[None]:
    yield
    if torch.distributed.is_initialized():
        layout.shutdown()


def test_command_measures_both_sides_and_keeps_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: None
) -> None:
    out = tmp_path / "out.json"
    sizes = ["--steps", "2", "--length", "8", "--sequences", "3", "--hidden", "32", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_reference.py", *sizes, "--json", str(out), "--limit", "1e-6"])
    with pytest.raises(SystemExit, match="the limit is 1e-06"):
        bench_reference.main()
    result = json.loads(out.read_text())
    assert result["ours"]["steps"] == result["transformers"]["steps"] == 2
    assert result["ratio"] == result["ours"]["seconds"] / result["transformers"]["seconds"] > 0
    assert result["what"].startswith("3 sequences of 8 tokens (24 a step)")
    assert max(result["relative_difference"].values()) < 1e-5
    assert f"{result['ratio']:.3f}" in capsys.readouterr().out


def test_reference_has_the_stated_size() -> None:
    config = model_config(Shape())
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    parts = (model.model.language_model, model.lm_head)
    count = sum(value.numel() for part in parts for value in part.parameters())
    assert round(count / 1e6, 2) == 1.05
    matrices = [value for name, value in model.named_parameters() if value.dim() > 1 and "visual" not in name]
    assert sum(value.numel() for value in matrices) - 1024 * 128 == Shape().matrix_parameters  # without embedding


def test_other_weights_are_not_timed(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    class Disturbed(bench_reference.Theirs):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)
            with torch.no_grad():
                self.parameters[1].mul_(1.01)

    monkeypatch.setattr(bench_reference, "Theirs", Disturbed)
    with pytest.raises(SystemExit, match="not the same computation"):
        bench_reference.measure(SHAPE, sequences=2, length=6, steps=1)


def test_both_sides_stay_together_over_updates(tmp_path: Path, alone: None) -> None:
    layout.initialize(layout.Layout())
    write_model(tmp_path, SHAPE)
    samples = make_samples(2, 6, SHAPE.vocabulary)
    ours, theirs = bench_reference.Ours(tmp_path, samples), bench_reference.Theirs(tmp_path, samples)
    losses = [(ours.step(), theirs.step()) for _ in range(5)]
    assert [one for one, _ in losses] == pytest.approx([other for _, other in losses], rel=1e-5)
    assert losses[-1][0] < losses[0][0]


def test_sides_take_turns() -> None:
    order: list[str] = []

    def side(name: str):
        return lambda: order.append(name) or 0.0

    seconds = bench_reference.turn_about(2, side("a"), side("b"))
    assert order == ["a", "b"] * (bench_reference.WARM_UP + 2)
    assert [len(each) for each in seconds] == [2, 2]


def test_sequences_are_computed_whole_and_share_no_prompt() -> None:
    from copd_megatron.policy.batching import NATIVE, pack

    samples = make_samples(3, 7, 64)
    packed = pack(samples, 21, {NATIVE: 3}, lambda prompt: torch.zeros(3, len(prompt.token_ids), dtype=torch.long), -1)
    assert (packed.tokens, len(packed.microbatches)) == (21, 1)
    assert len(packed.microbatches[0].targets) == 21
    assert make_samples(3, 7, 64)[2].rollout.token_ids == samples[2].rollout.token_ids


def test_loss_is_the_mean_cross_entropy() -> None:
    logits, targets = torch.randn(6, 9), torch.arange(6)
    weight = torch.full((6,), 1 / 6)
    zeros = torch.zeros(6)
    loss, _ = cross_entropy(logits, targets, Signals(zeros.long(), weight, zeros, zeros))
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)))


def test_operations_are_counted_as_a_sum_over_products() -> None:
    shape = Shape(hidden=4, layers=1, heads=2, groups=1, head_dim=2, mlp=3, vocabulary=5)
    matrices = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4 + 3 * 4 * 3 + 4 * 5
    assert shape.matrix_parameters == matrices
    scores_and_values = 2 * (2 * 2 * 10 * 10 * 2) / 2  # two products of 2 · heads · dim · length², half of it causal
    assert shape.flops([10]) == 6 * matrices * 10 + 3 * scores_and_values
