"""A merged folder is the average of its inputs, whatever their order and format; what cannot be averaged is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_models import content, family, save, values
from safetensors import safe_open

from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.weights.convert import to_megatron
from copd_megatron.weights.hf import SINGLE, HfFolder, write_folder
from copd_megatron.weights.merge.folders import merge_folders
from copd_megatron.weights.merge.recipe import METHODS, Recipe
from copd_megatron.weights.merge.sources import WholeSource


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
    merge_folders([a, b], tmp_path / "out", a, Recipe(weights=(0.75, 0.25)))
    assert HfFolder(tmp_path / "out").tensor("x").tolist() == [2.0, 1.0]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_result_is_computed_in_float32_and_rounded_once_to_the_format_of_the_base(
    tmp_path: Path, stored: torch.dtype
) -> None:
    base = _folder(tmp_path / "base", x=torch.zeros(1000, dtype=torch.bfloat16))
    values = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)).to(stored) for seed in range(3)]
    inputs = [_folder(tmp_path / str(seed), x=value) for seed, value in enumerate(values)]
    merge_folders(inputs, tmp_path / "out", base, Recipe(weights=(0.3, 0.3, 0.4)))
    merged = HfFolder(tmp_path / "out").tensor("x")
    exact = 0.3 * values[0].double() + 0.3 * values[1].double() + 0.4 * values[2].double()
    assert merged.dtype == torch.bfloat16
    half_step = torch.exp2(exact.abs().log2().floor() - 8)
    assert ((merged.double() - exact).abs() <= half_step + 1e-6).all()


def test_merging_copies_of_one_model_returns_it(save_model: Callable[..., Path], tmp_path: Path) -> None:
    base = save_model(0, torch.bfloat16)
    merge_folders([base, base], tmp_path / "out", base)
    copy, original = HfFolder(tmp_path / "out"), HfFolder(base)
    assert all(torch.equal(copy.tensor(name), original.tensor(name)) for name in original.names())


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


@pytest.mark.parametrize("different", [{"model_type": "qwen"}, {"architectures": ["Other"]}, {"vocab_size": 65}])
def test_other_architectures_and_vocabularies_are_refused(tmp_path: Path, different: dict[str, object]) -> None:
    base, other = save(tmp_path / "base", values(0)), save(tmp_path / "other", values(1), **different)
    with pytest.raises(WeightsError, match=r"other: .*only models of one"):
        merge_folders([base, other], tmp_path / "out", base)
    assert not list(tmp_path.glob("*out*"))


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<pad>", "id": 2}]}
    (base / "tokenizer.json").write_text(json.dumps(tokens))
    (inputs[0] / "tokenizer.json").write_text(json.dumps(tokens, indent=2))
    merge_folders(inputs, tmp_path / "out", base)
    tokens["added_tokens"][0]["id"] = 3
    (inputs[1] / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(WeightsError, match=r"input2/tokenizer\.json: its vocabulary differs .* in 1 tokens, .*<pad>"):
        merge_folders(inputs, tmp_path / "out2", base)


def test_output_with_content_is_replaced_only_if_allowed(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    merge_folders(inputs, tmp_path / "out", base)
    before = content(tmp_path / "out")
    with pytest.raises(WeightsError, match="is not empty"):
        merge_folders(inputs[:1], tmp_path / "out", base)
    assert content(tmp_path / "out") == before
    merge_folders(inputs[:1], tmp_path / "out", base, overwrite=True)
    assert content(tmp_path / "out") == content(inputs[0])
    assert sorted(path.name for path in tmp_path.glob("*out*")) == ["out"]


def test_a_disk_that_is_too_small_is_refused_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, inputs = family(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(WeightsError, match=r"67\.2 MB are needed, .* has 10\.0 kB left"):
        merge_folders(inputs, tmp_path / "out", base)
    assert not list(tmp_path.glob("*out*"))


def test_pickled_models_are_refused(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 1)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match="only pickled weights"):
        merge_folders([*inputs, pickled], tmp_path / "out", base)


@pytest.mark.parametrize("experts", [0, 3])
def test_megatron_checkpoints_merge_as_the_models_in_them(
    save_model: Callable[..., Path], tmp_path: Path, experts: int
) -> None:
    base, *models = (save_model(seed, torch.bfloat16, experts) for seed in range(3))
    checkpoint = tmp_path / "checkpoint"
    to_megatron(models[0], checkpoint)
    recipe = Recipe("ties", weights=(0.7, 0.3), density=0.4)
    merge_folders(models, tmp_path / "expected", base, recipe)
    merge_folders([checkpoint, models[1]], tmp_path / "out", base, recipe)
    expected = HfFolder(tmp_path / "expected")
    assert HfFolder(tmp_path / "out").names() == expected.names()
    assert all(torch.equal(HfFolder(tmp_path / "out").tensor(name), tensor) for name, tensor in expected.tensors())


def test_megatron_checkpoints_without_a_manifest_are_read_only_if_trusted(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, model = save_model(0), save_model(1)
    checkpoint = tmp_path / "checkpoint"
    to_megatron(model, checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(WeightsError, match=r"manifest\.json.*--trust"):
        merge_folders([model, checkpoint], tmp_path / "out", base)
    merge_folders([checkpoint], tmp_path / "out", base, trust=True)
    assert all(
        torch.equal(HfFolder(tmp_path / "out").tensor(name), tensor) for name, tensor in HfFolder(model).tensors()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_no_method_hides_a_value_that_is_not_finite(tmp_path: Path, method: str, bad: float) -> None:
    base, (first, second) = family(tmp_path, 2)
    sick = {name: tensor.clone() for name, tensor in HfFolder(second).tensors()}
    sick["lm_head.weight"][3, 5] = bad
    save(second, sick)
    for seed in range(3):
        recipe = Recipe(method, seed=seed, density=0.1 if method in ("ties", "dare_linear", "dare_ties") else None)
        with pytest.raises(WeightsError, match=r"input2: tensor lm_head\.weight holds NaN or infinite"):
            merge_folders([first, second], tmp_path / "out", base, recipe)


@pytest.mark.parametrize("method", ["task", "ties", "dare_ties", "multislerp"])
def test_a_base_that_is_not_finite_is_named(tmp_path: Path, method: str) -> None:
    base, inputs = family(tmp_path, 2)
    sick = {name: tensor.clone() for name, tensor in HfFolder(base).tensors()}
    sick["model.norm.weight"][0] = float("nan")
    save(base, sick)
    with pytest.raises(WeightsError, match=r"base: tensor model\.norm\.weight holds NaN"):
        merge_folders(inputs, tmp_path / "out", base, Recipe(method))


def test_weights_by_pattern_are_used_for_the_tensors_that_match(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    patterns = (("model.layers.*", (1.0, 0.0)), ("*.1.mlp.*", (0.0, 1.0)))
    merge_folders(inputs, tmp_path / "out", base, Recipe(tensor_weights=patterns))
    first, second, out = (dict(HfFolder(path).tensors()) for path in (*inputs, tmp_path / "out"))
    for name, tensor in out.items():
        if ".1.mlp." in name:
            expected = second[name]
        elif ".layers." in name:
            expected = first[name]
        else:
            expected = (first[name] + second[name]) / 2
        assert torch.equal(tensor, expected), name


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    base, inputs = family(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"no tensor's name matches 'model\.visual\.\*'"):
        merge_folders(inputs, tmp_path / "out", base, Recipe(tensor_weights=(("model.visual.*", (0, 1)),)))


def test_experts_that_lie_transposed_are_merged_in_the_published_form(
    save_model: Callable[..., Path], tmp_path: Path
) -> None:
    # transformers writes the second form; writing a folder of ours gives the published one.
    saved = [save_model(seed, torch.float32, 3) for seed in range(3)]
    published = tmp_path / "published"
    write_folder(published, HfFolder(saved[1]).tensors(), saved[1])
    names = [name for name in HfFolder(saved[1]).names() if name.endswith("experts.gate_up_proj")]
    with safe_open(saved[1] / "model.safetensors", "pt") as before, safe_open(published / SINGLE, "pt") as after:
        assert all(before.get_tensor(name).shape != after.get_tensor(name).shape for name in names)
    assert names
    merge_folders([published, saved[2]], tmp_path / "out", saved[0], Recipe("task", scale=0.5))
    base, first, second, out = (dict(HfFolder(path).tensors()) for path in (saved[0], *saved[1:], tmp_path / "out"))
    for name, tensor in out.items():
        expected = base[name] + 0.25 * (first[name] - base[name]) + 0.25 * (second[name] - base[name])
        assert torch.allclose(tensor, expected, atol=1e-6), name


def test_any_model_that_hands_out_tensors_can_be_a_source(tmp_path: Path) -> None:
    _, inputs = family(tmp_path, 1)
    folder = HfFolder(inputs[0])
    source = WholeSource("model", folder, folder.config, None)
    part = torch.empty(40)
    for name in ("lm_head.weight", "model.embed_tokens.weight", "lm_head.weight"):
        source.read(name, 100, part)
        assert torch.equal(part, folder.tensor(name).reshape(-1)[100:140])
    assert source.form("lm_head.weight").shape == (64, 32)
    assert set(source.names()) == set(folder.names())


def test_empty_and_scalar_tensors_are_merged(tmp_path: Path) -> None:
    a = _folder(tmp_path / "a", nothing=torch.empty(0, 3), number=torch.tensor(1.0))
    b = _folder(tmp_path / "b", nothing=torch.empty(0, 3), number=torch.tensor(3.0))
    for method in METHODS:
        merge_folders([a, b], tmp_path / method, a, Recipe(method))
        assert HfFolder(tmp_path / method).tensor("nothing").shape == (0, 3)
    assert HfFolder(tmp_path / "linear").tensor("number").item() == 2.0
