"""FP8: megatron-core accepts the keywords, and what a machine lacks is named before anything is built."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from copd_megatron.config.training import PrecisionConfig
from copd_megatron.errors import ConfigError
from copd_megatron.policy import fp8
from copd_megatron.policy.fp8 import RECIPES, Machine, Recipe, fp8_options, token_multiple, why_not

HOPPER = Machine(capability=(9, 0), engine=(2, 20), cuda=(13, 0))


def transformer_config(**options: object):
    from copd_megatron.policy.platform import prepare

    prepare()
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=8, hidden_size=64, num_attention_heads=4, bf16=True, pipeline_dtype=torch.bfloat16, **options
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_accepts_the_keywords(recipe: Recipe) -> None:
    config = transformer_config(
        pipeline_model_parallel_size=2, **fp8_options(recipe, layers=8, stages=2, machine=HOPPER)
    )
    assert (config.fp8, config.fp8_recipe) == ("e4m3" if recipe == "blockwise" else "hybrid", recipe)
    assert config.first_last_layers_bf16 == (recipe != "delayed")
    assert not config.fp8_param


def test_without_fp8_nothing_is_said_and_nothing_is_needed() -> None:
    assert fp8_options("none", layers=1, machine=Machine(None, "absent", None)) == {}
    assert token_multiple("none") == 1
    assert [token_multiple(recipe) for recipe in RECIPES] == [16, 16, 128]


def test_layers_at_the_ends_stay_in_bf16() -> None:
    def ends(**counts: int) -> tuple[bool, int, int]:
        options = fp8_options("tensorwise", layers=8, machine=HOPPER, **counts)
        config = transformer_config(**options)
        return (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16)

    assert ends() == (True, 1, 1)
    assert ends(bf16_layers_at_start=0, bf16_layers_at_end=3) == (True, 0, 3)
    assert ends(bf16_layers_at_start=0, bf16_layers_at_end=0) == (False, 0, 0)


@pytest.mark.parametrize(("count", "stages"), [(5, 2), (-1, 1)])
def test_more_bf16_layers_than_a_stage_has_are_refused(count: int, stages: int) -> None:
    with pytest.raises(ConfigError, match=rf"fp8_bf16_layers_at_end = {count}: expected 0 to {8 // stages}"):
        fp8_options("tensorwise", layers=8, stages=stages, bf16_layers_at_end=count, machine=HOPPER)
    with pytest.raises(ValueError, match="num_layers_at_end_in_bf16"):  # as megatron-core sees it
        transformer_config(
            fp8="hybrid",
            fp8_recipe="tensorwise",
            first_last_layers_bf16=True,
            num_layers_at_end_in_bf16=count,
            pipeline_model_parallel_size=stages,
        )


def test_delayed_has_no_bf16_layers() -> None:
    with pytest.raises(ConfigError, match="delayed has every layer in FP8"):
        fp8_options("delayed", layers=8, bf16_layers_at_start=1, machine=HOPPER)
    assert fp8_options("delayed", layers=8, bf16_layers_at_start=0, machine=HOPPER)["fp8_amax_history_len"] == 1024


def test_matrices_that_cannot_be_multiplied_are_named() -> None:
    sizes = {"text_config.hidden_size": 2560, "text_config.intermediate_size": 1208}
    with pytest.raises(ConfigError, match=r"text_config.intermediate_size .* 1208, .* multiple of 16"):
        fp8_options("blockwise", layers=8, sizes=sizes, machine=HOPPER)
    assert fp8_options("blockwise", layers=8, sizes={"text_config.hidden_size": 2560}, machine=HOPPER)


@pytest.mark.parametrize(
    ("change", "recipe", "lacks"),
    [
        ({"capability": (8, 0)}, "tensorwise", "compute capability is 8.0, 8.9 is needed"),
        ({"capability": (8, 9)}, "delayed", None),
        ({"capability": (8, 9)}, "blockwise", "compute capability is 8.9, 9.0 is needed"),
        ({"engine": (2, 1)}, "tensorwise", "Transformer Engine is 2.1, 2.2 is needed"),
        ({"engine": (2, 2)}, "blockwise", "Transformer Engine is 2.2, 2.3 is needed"),
        ({"engine": "Transformer Engine is not installed"}, "delayed", "Transformer Engine is not installed"),
        ({"cuda": (12, 6)}, "blockwise", "torch is built for CUDA 12.6, 12.9 is needed"),
        ({"cuda": (12, 6)}, "tensorwise", None),
        ({}, "blockwise", None),
    ],
)
def test_what_is_missing_is_said(change: dict[str, object], recipe: Recipe, lacks: str | None) -> None:
    machine = dataclasses.replace(HOPPER, **change)  # type: ignore[arg-type]
    assert why_not(recipe, machine) == lacks
    if lacks:
        with pytest.raises(ConfigError, match=f"precision.fp8 = {recipe} cannot be used here: {lacks}"):
            fp8_options(recipe, layers=8, machine=machine)


def test_a_machine_without_gpu_and_engine_hears_of_both() -> None:
    machine = Machine.found()
    if machine.capability is not None:
        pytest.skip("this machine has a GPU")
    missing = why_not("tensorwise")
    assert missing is not None
    assert "no GPU that torch can use" in missing
    assert "Transformer Engine" in missing


def test_an_engine_that_does_not_load_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    information = tmp_path / "transformer_engine-2.20.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: transformer-engine\nVersion: 2.20.2\n")
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("raise OSError('libnccl.so.2 not found')")
    monkeypatch.syspath_prepend(tmp_path)
    assert fp8.transformer_engine(load=False) == (2, 20)
    assert fp8.transformer_engine(load=True) == (
        "Transformer Engine 2.20.2 does not load (OSError: libnccl.so.2 not found)"
    )
    sys.modules.pop("transformer_engine", None)


def test_configuration_refuses_what_can_never_work() -> None:
    assert PrecisionConfig().fp8 == "none"
    assert PrecisionConfig(fp8="delayed").fp8_bf16_layers_at_start is None
    with pytest.raises(ValidationError, match="fp8 = tensorwise needs params = bf16, found fp32"):
        PrecisionConfig(params="fp32", fp8="tensorwise")
    with pytest.raises(ValidationError, match="delayed has every layer in FP8"):
        PrecisionConfig(fp8="delayed", fp8_bf16_layers_at_end=2)
    with pytest.raises(ValidationError, match="tensorwise"):
        PrecisionConfig(fp8="mxfp8")  # type: ignore[arg-type]
