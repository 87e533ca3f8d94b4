"""The tiny model is a real Qwen3-VL folder, made from a seed, whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from copd_megatron.data.mini.model import ModelSize, build
from copd_megatron.data.mini.tokenizer import CHARACTERS, ROLES, SPECIAL_TOKENS
from copd_megatron.errors import WeightsError
from copd_megatron.policy.platform import declare_torchvision_schemas

COMMAND = Path(__file__).parents[2] / "tools" / "mini_model.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "mini"
    assert build(out, seed=0) == 1_442_688
    return out


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    declare_torchvision_schemas()
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    declare_torchvision_schemas()
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def test_the_folder_loads_as_a_qwen3_vl_and_its_processor(model: Any, processor: Any) -> None:
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen3VLProcessor"
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessor"
    assert type(processor.video_processor).__name__ == "Qwen3VLVideoProcessor"
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_442_688
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_every_part_of_the_architecture_is_there(model: Any) -> None:
    text, vision = model.config.text_config, model.config.vision_config
    assert text.num_attention_heads == 2 * text.num_key_value_heads
    assert text.rope_parameters["mrope_section"] == [6, 5, 5]
    assert text.rope_parameters["mrope_interleaved"] is True
    assert vision.deepstack_visual_indexes == [0]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["model.language_model.layers.3.self_attn.q_norm.weight"] == (32,)
    assert shapes["model.visual.merger.linear_fc2.weight"] == (128, 384)
    assert shapes["model.visual.deepstack_merger_list.0.linear_fc2.weight"] == (128, 384)
    assert model.lm_head.weight.data_ptr() != model.model.language_model.embed_tokens.weight.data_ptr()
    assert model.lm_head.weight.std().item() == pytest.approx(0.04, rel=0.05)


@pytest.mark.parametrize("with_picture", [False, True])
def test_it_generates_until_the_end_of_turn_or_the_limit(model: Any, processor: Any, with_picture: bool) -> None:
    content: list[dict[str, Any]] = [{"type": "text", "text": "sum="}]
    if with_picture:
        content.insert(0, {"type": "image", "image": Image.new("RGB", (32, 8))})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == end
    new = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert 1 <= len(new) <= 8
    assert len(new) == 8 or new[-1] == end


def test_the_picture_changes_the_prediction(model: Any, processor: Any) -> None:
    pictures = [Image.fromarray(np.full((8, 32, 3), grey, np.uint8)) for grey in (0, 255)]
    text = "<|vision_start|><|image_pad|><|vision_end|>sum="
    with torch.no_grad():
        dark, light = (
            model(**processor(text=[text], images=[picture], return_tensors="pt")).logits[0, -1] for picture in pictures
        )
    assert (dark - light).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("size", "grid"),
    [((32, 8), [1, 2, 8]), ((64, 8), [1, 2, 16]), ((256, 256), [1, 64, 64]), ((512, 512), [1, 64, 64])],
)
def test_pictures_up_to_the_limit_are_not_resized(processor: Any, size: tuple[int, int], grid: list[int]) -> None:
    processed = processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")
    assert processed["image_grid_thw"].tolist() == [grid]


def test_pixels_reach_the_model_unchanged(processor: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    values = processor.image_processor(images=[Image.fromarray(pixels)], return_tensors="pt")["pixel_values"]
    first = values[0].view(3, 2, 4, 4)
    expected = torch.from_numpy(pixels[:4, :4]).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(first[:, 0], expected, atol=1e-6, rtol=0)
    assert torch.equal(first[:, 0], first[:, 1])


def test_every_character_role_and_special_token_is_one_token(processor: Any) -> None:
    tokenizer = processor.tokenizer
    for token in [*CHARACTERS, *ROLES, *SPECIAL_TOKENS]:
        ids = tokenizer(token)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids) == token
    text = "<|im_start|>user\nsum 3852=<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nsum 3852=\n"
    assert tokenizer("É")["input_ids"] == [tokenizer.unk_token_id]
    assert len(tokenizer) <= 64


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    build(tmp_path / "same", seed=0)
    build(tmp_path / "other", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    names = sorted(file.name for file in folder.iterdir())
    assert names == sorted(file.name for file in (tmp_path / "same").iterdir())
    for name in names:
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes(), name
        differs = (tmp_path / "other" / name).read_bytes() != (folder / name).read_bytes()
        assert differs == (name == "model.safetensors"), name


def test_other_sizes_can_be_chosen(tmp_path: Path) -> None:
    size = ModelSize(hidden=64, layers=2, head_dim=16, vision_layers=2, deepstack=(0, 1), patch=8)
    build(tmp_path / "small", seed=0, size=size)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tmp_path / "small")
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (64, 2)
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 8
    assert config.vision_config.patch_size == 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 3}, "heads 3 is no multiple of kv_heads 2"),
        ({"vision_hidden": 90}, "vision_hidden 90 is no multiple of vision_heads 4"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"deepstack": (3,)}, "deepstack names vision layers .3., but there are 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        ModelSize(**wrong)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(WeightsError, match="is not empty"):
        build(tmp_path, seed=0)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    declare_torchvision_schemas()
    from transformers import Qwen3VLProcessor

    def full_disk(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Qwen3VLProcessor, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path / "mini", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_folder_and_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, COMMAND, *arguments], capture_output=True, text=True, check=False)

    done = run(str(tmp_path / "mini"), "--seed", "0", "--deepstack", "0")
    assert done.returncode == 0, done.stderr
    assert "1.44 M parameters from seed 0" in done.stdout
    assert (tmp_path / "mini" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    refused = run(str(tmp_path / "mini"))
    assert refused.returncode == 1
    assert "is not empty" in refused.stderr
    assert "Traceback" not in refused.stderr
