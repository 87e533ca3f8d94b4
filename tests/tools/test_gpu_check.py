"""The GPU check on a machine without one: every part runs or says why not, and a wrong value is never timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_check
import gpu_check_attention
import gpu_check_training
import pytest
import torch
from gpu_check import RECIPES, TINY, attempt, parts_of
from gpu_check_attention import attention_part, reference, uneven_lengths
from gpu_check_timing import NotRun, matmul_rate
from gpu_check_training import Stack, batch_of, packed_part, padded, training_part

from copd_megatron.errors import ConfigError
from copd_megatron.policy import layout
from copd_megatron.policy.fp8 import Machine

CPU = torch.device("cpu")
HOPPER = Machine(capability=(9, 0), engine=(2, 20), cuda=(13, 0))

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="describes a machine without a GPU")


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    layout.initialize(layout.Layout())
    yield
    layout.shutdown()


def test_smoke_runs_what_a_cpu_can_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu-smoke", "--out", str(out)])
    gpu_check.main()
    result = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) == result
    assert not [name for name, part in parts_of(result) if part.get("broken")]

    measured = {name for name, part in parts_of(result) if "not_run" not in part}
    assert measured == {
        "bf16 matrix product", "training: bf16", "training: fp32", "packing: bf16", "packing: fp32",
        "attention: ours", "attention: ours_responses",
    }  # fmt: skip
    for name, part in parts_of(result):
        assert name in shown
        if "not_run" in part:
            assert "GPU" in part["not_run"] or "Blackwell" in part["not_run"], name
    assert {f"training: {recipe}" for recipe in (*RECIPES, "mxfp8")} <= {name for name, _ in parts_of(result)}
    assert result["facts"]["torch"] == torch.__version__
    assert result["facts"]["transformer-engine"] is None
    assert result["facts"]["gpu"] is None

    # The same weights and data in either precision: the losses start and stay together.
    pairs = zip(result["training"]["bf16"]["losses"], result["training"]["fp32"]["losses"], strict=True)
    assert all(abs(one - other) < 0.01 for one, other in pairs)
    assert result["training"]["fp32"]["losses"][0] == pytest.approx(math.log(128), abs=0.1)
    assert result["packing"]["fp32"]["relative_difference"]["loss"] < 1e-5


def test_without_cuda_it_ends_with_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match=r"torch finds no CUDA device; .* --cpu-smoke"):
        gpu_check.main()


def test_a_broken_part_is_reported_and_ends_the_command_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise RuntimeError("illegal memory access\nmore")

    for part in ("matmul_rate", "packed_part", "attention_part", "training_part"):
        monkeypatch.setattr(gpu_check, part, broken)
    monkeypatch.setattr(gpu_check, "_config", lambda sizes: None)
    out = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--cpu-smoke", "--out", str(out)])
    with pytest.raises(SystemExit, match="bf16 matrix product, training: bf16"):
        gpu_check.main()
    part = json.loads(out.read_text())["matmul_bf16"]
    assert part["not_run"] == "RuntimeError: illegal memory access"
    assert part["broken"]
    assert "BROKEN: RuntimeError" in capsys.readouterr().out


def test_the_project_is_found_where_it_is_not_installed() -> None:
    packages = Path(torch.__file__).parents[1]
    code = "import from_checkout, copd_kernels.reference, copd_megatron.policy.fp8 as fp8; print(fp8.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],  # without site nothing that is installed as editable can be found
        env={**os.environ, "PYTHONPATH": f"{packages}:{Path(gpu_check.__file__).parent}"},
        cwd=packages,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == Path(gpu_check.__file__).parents[1] / "copd_megatron" / "policy" / "fp8.py"


@pytest.mark.parametrize("reason", [NotRun("no GPU"), ConfigError("no GPU")])
def test_what_cannot_run_is_not_broken(reason: Exception) -> None:
    def run() -> dict[str, Any]:
        raise reason

    assert attempt(run) == {"not_run": "no GPU"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_recipe_trains_on_padded_tokens_from_the_same_weights(
    alone: None, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Without Transformer Engine megatron-core takes the settings and computes in bf16: the path is the same."""
    monkeypatch.setattr(gpu_check_training, "why_not", lambda recipe: None)
    monkeypatch.setattr(Machine, "found", staticmethod(lambda: HOPPER))
    sizes = replace(TINY, steps=3)
    tokens = []
    real = gpu_check_training.train_pass

    def spy(model: Any, batches: Any, loss: Any) -> Any:
        tokens.append(batches[0].token_ids.numel())
        return real(model, batches, loss)

    monkeypatch.setattr(gpu_check_training, "train_pass", spy)
    expected, first = training_part(sizes, "bf16", "none", 1.0, None, None)
    found, stack = training_part(sizes, "bf16", recipe, 1.0, first.weights, expected["losses"], kept=1)  # type: ignore[arg-type]
    assert tokens == [72] * 3 + [80 if recipe != "blockwise" else 128] * 3
    assert (stack.config.fp8_recipe, stack.config.first_last_layers_bf16) == (recipe, recipe != "delayed")
    assert found["loss_difference"]["largest"] < 0.02
    assert found["mfu_of_measured_bf16"] == found["tflops"]


def test_losses_that_do_not_fall_are_an_error(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check_training, "LEARNING_RATE", 0.0)
    with pytest.raises(RuntimeError, match="nothing was learnt"):
        training_part(replace(TINY, steps=5), "fp32", "none", 1.0, None, None)


def test_padding_keeps_the_sequences_and_counts_for_nothing(alone: None) -> None:
    batch = batch_of([5, 2, 7], vocabulary=64, seed=0)
    filled = padded(batch)
    assert filled.token_ids.numel() == 21
    real = filled.signals.weight > 0
    assert filled.targets[real].tolist() == batch.targets.tolist()
    assert float(filled.signals.weight.sum()) == pytest.approx(1)
    apart = packed_part(TINY, "fp32")["relative_difference"]
    assert apart["loss"] < 1e-5
    assert apart["grad_norm"] < 1e-4


def test_padding_that_counts_is_noticed(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(batch: Any) -> Any:
        filled = padded(batch)
        weight = torch.full_like(filled.signals.weight, 1 / len(filled.targets))
        return replace(filled, signals=replace(filled.signals, weight=weight))

    monkeypatch.setattr(gpu_check_training, "padded", counted)
    with pytest.raises(RuntimeError, match="packed and padded differ"):
        packed_part(TINY, "fp32")


def test_data_can_be_learnt_and_is_the_same_every_time() -> None:
    one, other = (batch_of([6, 4], 64, seed=1) for _ in range(2))
    assert torch.equal(one.token_ids, other.token_ids)
    previous = one.token_ids[one.logit_index]
    assert (((one.targets - 5 * previous - 7) % 60) < 4).all()


@pytest.mark.parametrize("which", ["ours", "ours_responses"])
def test_attention_is_compared_with_float32(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    part = attention_part(TINY, CPU, None, which)
    assert sum(part["lengths"]) == sum(uneven_lengths(TINY.sequences, TINY.length))
    assert 0 < max(part["relative_error"].values()) < 0.01
    monkeypatch.setattr(gpu_check_attention, "reference", lambda q, k, v, lengths: reference(q, k, 1.1 * v, lengths))
    with pytest.raises(RuntimeError, match="not the attention of float32"):
        attention_part(TINY, CPU, None, which)


def test_reference_attention_is_torchs() -> None:
    query, key, value = (torch.randn(7, heads, 8) for heads in (4, 2, 2))
    expected = [
        torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1)[None] for part in parts), is_causal=True, enable_gqa=True
        )[0].transpose(0, 1)
        for parts in zip(query.split([3, 4]), key.split([3, 4]), value.split([3, 4]), strict=True)
    ]
    torch.testing.assert_close(reference(query, key, value, [3, 4]), torch.cat(expected))


def test_engine_attention_and_products_need_a_gpu() -> None:
    with pytest.raises(NotRun, match="Transformer Engine"):
        attention_part(TINY, CPU, None, "transformer_engine")
    with pytest.raises(NotRun, match="no GPU"):
        gpu_check_attention.linear_part("delayed", TINY, CPU)


def test_matrix_rate_counts_two_operations_per_product() -> None:
    rates = matmul_rate(TINY, CPU)
    assert rates["mlp_up"]["shape"] == [72, 64, 192]
    assert rates["tflops"] == max(rates[name]["tflops"] for name in ("square", "mlp_up", "mlp_down")) > 0


def test_sizes_are_those_of_a_qwen3_vl_4b() -> None:
    sizes = gpu_check.qwen3_4b(layers=36, vocabulary=0, sequences=1, length=1, steps=1)
    assert sizes.shape.matrix_parameters == pytest.approx(3.63e9, rel=0.01)


def test_stacks_start_from_the_weights_they_are_given(alone: None) -> None:
    one = Stack(TINY.shape, "fp32")
    one.step(batch_of([4], 128, seed=0))
    other = Stack(TINY.shape, "fp32", weights=one.weights)
    for name, parameter in other.model.module.named_parameters():
        assert torch.equal(parameter, one.weights[name])
