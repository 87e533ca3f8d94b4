"""Prompts for models that take text alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from copd_megatron.data.example import Example
from copd_megatron.data.mini.model import build
from copd_megatron.data.prompts import PromptBuilder, TextProcessor, load_processor
from copd_megatron.errors import DataError, WeightsError

TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.content if message.content is string else '' }}<|im_end|>
{%- endfor -%}<|im_start|>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer whose chat template, as Qwen3's, skips content in parts."""
    out = tmp_path_factory.mktemp("text")
    build(out / "mini", seed=0)
    tokenizer = load_processor(out / "mini").tokenizer
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out / "text")
    (out / "text" / "config.json").write_text('{"model_type": "qwen3"}')
    return out / "text"


@pytest.fixture
def builder(folder: Path) -> PromptBuilder:
    processor = load_processor(folder)
    assert isinstance(processor, TextProcessor)
    return PromptBuilder(processor, max_prompt_tokens=16)


def asked(content: object, *images: Image.Image) -> Example:
    return Example("row 7", [{"role": "user", "content": content}], "1", "digits", images)


def test_text_in_parts_is_text(builder: PromptBuilder) -> None:
    whole = builder.build(asked("sum 3852="), "text")
    parts = builder.build(asked([{"type": "text", "text": "sum 38"}, {"type": "text", "text": "52="}]), "text")

    assert whole.media is None
    assert whole.token_ids == parts.token_ids
    assert builder.tokenizer.decode(whole.token_ids) == "<|im_start|>sum 3852=<|im_end|><|im_start|>"


def test_images_are_refused_by_name(builder: PromptBuilder) -> None:
    picture = Image.new("RGB", (8, 8))
    parts = [{"type": "image"}, {"type": "text", "text": "sum="}]

    with pytest.raises(DataError, match=r"row 7: .* parts of type image for a model that takes text alone"):
        builder.build(asked(parts, picture), "text")
    with pytest.raises(DataError, match=r"row 7: media for a model that takes text alone: .* 1 images and 0 videos"):
        builder.build(asked("sum=", picture), "text")


def test_long_prompts_are_refused(builder: PromptBuilder) -> None:
    with pytest.raises(DataError, match="prompt too long"):
        builder.build(asked("sum 3852=" * 3), "text")


def test_a_model_that_sees_needs_more_than_a_tokenizer(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl", "vision_config": {}}')

    with pytest.raises(WeightsError, match=re.escape(str(tmp_path))):
        load_processor(tmp_path)
