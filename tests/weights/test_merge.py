"""A merged folder is the average of its inputs, whatever their order and format; what cannot be averaged is named."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from copd_megatron.errors import WeightsError
from copd_megatron.weights import merge
from copd_megatron.weights.hf import HfFolder, write_folder
from copd_megatron.weights.merge import linear, merge_folders


def _folder(path: Path, **tensors: torch.Tensor) -> Path:
    like = path.with_name("like")
    like.mkdir(exist_ok=True)
    (like / "config.json").write_text("{}")
    write_folder(path, tensors.items(), like)
    return path


def _logits(model: Any) -> torch.Tensor:
    """Of a prompt with one picture, [1, S, V]."""
    ids = torch.tensor([[5, 38, 36, 36, 39, 7, 8, 9, 10]])
    pixels = torch.randn(8, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == 36).long(),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 2, 4]]),
        ).logits


def test_merged_model_gives_the_logits_of_averaged_weights(
    save_model: Callable[..., Path], build_model: Callable[[int], Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    base, text, image = (save_model(seed) for seed in range(3))
    merge_folders([text, image], tmp_path / "merged", base, max_shard_bytes=20_000)
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    averaged, other = build_model(1), build_model(2).state_dict()
    averaged.load_state_dict({name: (weight + other[name]) / 2 for name, weight in averaged.state_dict().items()})
    assert all(torch.equal(weight, merged.state_dict()[name]) for name, weight in averaged.state_dict().items())
    assert torch.allclose(_logits(merged), _logits(averaged), atol=1e-5)
    assert not torch.allclose(_logits(merged), _logits(build_model(1)), atol=0.1)


def test_given_weights_are_used(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", x=torch.tensor([1.0, 2.0])), _folder(tmp_path / "b", x=torch.tensor([5.0, -2.0]))
    merge_folders([a, b], tmp_path / "out", a, weights=[0.75, 0.25])
    assert HfFolder(tmp_path / "out").tensor("x").tolist() == [2.0, 1.0]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_result_is_computed_in_float32_and_rounded_once_to_the_format_of_the_base(
    tmp_path: Path, stored: torch.dtype
) -> None:
    base = _folder(tmp_path / "base", x=torch.zeros(1000, dtype=torch.bfloat16))
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(stored) for seed in range(3)]
    inputs = [_folder(tmp_path / str(seed), x=value) for seed, value in enumerate(values)]
    merge_folders(inputs, tmp_path / "out", base, weights=[0.3, 0.3, 0.4])
    merged = HfFolder(tmp_path / "out").tensor("x")
    exact = 0.3 * values[0].double() + 0.3 * values[1].double() + 0.4 * values[2].double()
    assert merged.dtype == torch.bfloat16
    half_step = torch.exp2(exact.abs().log2().floor() - 8)
    assert ((merged.double() - exact).abs() <= half_step + 1e-6).all()


@given(
    values=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=5, max_size=5), min_size=2, max_size=4),
    weights=st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4),
)
def test_order_of_inputs_does_not_change_a_bit(values: list[list[float]], weights: list[float]) -> None:
    pairs = list(zip(map(torch.tensor, values), weights, strict=False))
    results = [
        linear([tensor for tensor, _ in order], [weight for _, weight in order])
        for order in itertools.permutations(pairs)
    ]
    assert all(torch.equal(result.view(torch.int32), results[0].view(torch.int32)) for result in results)


def test_large_tensors_are_merged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(7, 11, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    whole = linear(tensors, [0.2, 0.3, 0.5])
    monkeypatch.setattr(merge, "_CHUNK", 10)
    assert torch.equal(linear(tensors, [0.2, 0.3, 0.5]), whole)
    assert torch.allclose(whole, 0.2 * tensors[0] + 0.3 * tensors[1] + 0.5 * tensors[2])


def test_merging_copies_of_one_model_returns_it(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0, torch.bfloat16)
    merge_folders([base, base], tmp_path / "out", base)
    copy, original = HfFolder(tmp_path / "out"), HfFolder(base)
    assert all(torch.equal(copy.tensor(name), original.tensor(name)) for name in original.names())


def test_unknown_method_names_what_exists(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="'blend' does not exist; there is: linear"):
        merge_folders([tmp_path], tmp_path / "out", tmp_path, method="blend")


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([1.0], "1 given for 2 folders"),
        ([0.5, 0.6], r"sum to 1; found \[0.5, 0.6\], sum 1.1"),
        ([float("nan"), 1.0], "must be finite"),
    ],
)
def test_unusable_weights_are_refused(tmp_path: Path, weights: list[float], complaint: str) -> None:
    with pytest.raises(WeightsError, match=complaint):
        merge_folders([tmp_path, tmp_path], tmp_path / "out", tmp_path, weights=weights)


def test_no_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nothing to merge"):
        merge_folders([], tmp_path / "out", tmp_path)


def test_other_names_and_shapes_are_listed(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", x=torch.ones(2), y=torch.ones(2, 3), z=torch.ones(1))
    other = _folder(tmp_path / "other", x=torch.ones(2), y=torch.ones(3, 2), w=torch.ones(1))
    with pytest.raises(WeightsError) as refusal:
        merge_folders([base, other], tmp_path / "out", base)
    message = str(refusal.value)
    assert "other: has other tensors than the base" in message
    assert "z: missing" in message
    assert "w: not in the base" in message
    assert "y: shape [3, 2], in the base [2, 3]" in message
    assert "x:" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused_with_folder_and_tensor(tmp_path: Path, bad: float) -> None:
    base = _folder(tmp_path / "base", x=torch.ones(3), y=torch.ones(3))
    sick = _folder(tmp_path / "sick", x=torch.ones(3), y=torch.tensor([1.0, bad, 1.0]))
    with pytest.raises(WeightsError, match="sick: tensor y holds NaN or infinite"):
        merge_folders([base, sick], tmp_path / "out", base)
    assert not (tmp_path / "out").exists()


def test_overflow_of_the_format_of_the_base_is_refused(tmp_path: Path) -> None:
    base = _folder(tmp_path / "base", x=torch.ones(1, dtype=torch.float16))
    large = _folder(tmp_path / "large", x=torch.tensor([1e6]))
    with pytest.raises(WeightsError, match=r"tensor x: the merged values do not fit into the base's torch\.float16"):
        merge_folders([large, large], tmp_path / "out", base)


def test_eight_bit_weights_are_refused(tmp_path: Path) -> None:
    small = _folder(tmp_path / "small", x=torch.ones(2).to(torch.float8_e4m3fn))
    with pytest.raises(WeightsError, match=r"tensor x is torch\.float8_e4m3fn, which cannot be averaged"):
        merge_folders([small, small], tmp_path / "out", small)


def test_whole_numbers_are_kept_if_equal_and_refused_if_not(tmp_path: Path) -> None:
    a, b = _folder(tmp_path / "a", n=torch.tensor([3])), _folder(tmp_path / "b", n=torch.tensor([4]))
    merge_folders([a, a], tmp_path / "out", a)
    assert HfFolder(tmp_path / "out").tensor("n").tolist() == [3]
    with pytest.raises(WeightsError, match=r"b: tensor n is torch\.int64"):
        merge_folders([a, b], tmp_path / "out2", a)
