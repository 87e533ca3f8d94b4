"""Prompts are what the plain Hugging Face processor makes of an example; what cannot become one is refused by name."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from copd_megatron.data.example import Example, Video
from copd_megatron.data.mini import MiniSource, MiniTask
from copd_megatron.data.mini.model import build
from copd_megatron.data.patches import STACKED_PIXELS
from copd_megatron.data.prompts import PromptBuilder, load_processor, stop_token_ids
from copd_megatron.errors import DataError, WeightsError
from copd_megatron.rollout.types import Media

PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "mini"
    build(out, seed=0)
    return out


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return load_processor(folder)


@pytest.fixture
def builder(processor: Any) -> PromptBuilder:
    return PromptBuilder(processor, max_prompt_tokens=4096)


def picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def clip(frames: int, width: int, height: int, fps: float = 2.0, seed: int = 0, every: int = 1) -> Video:
    """A video of which every `every`-th frame is there."""
    shown = tuple(picture(width, height, seed=100 * seed + number) for number in range(frames))
    return Video(shown, fps, tuple(range(0, frames * every, every)), frames * every)


def example(*parts: str | Image.Image | Video, uid: str = "u", system: str | None = None) -> Example:
    """A user's message of texts, pictures and videos in the given order."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "video" if isinstance(part, Video) else "image"}
        for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})  # type: ignore[dict-item]
    images = tuple(part for part in parts if isinstance(part, Image.Image))
    videos = tuple(part for part in parts if isinstance(part, Video))
    return Example(uid=uid, messages=messages, answer="1", verifier="digits", images=images, videos=videos)


def plain(processor: Any, wanted: Example) -> Any:
    """What transformers makes of the example in one call."""
    from transformers.video_utils import VideoMetadata

    videos = {}
    if wanted.videos:
        videos = {
            "videos": [[np.array(frame) for frame in video.frames] for video in wanted.videos],
            "video_metadata": [
                VideoMetadata(total_num_frames=video.total, fps=video.fps, frames_indices=list(video.indices))
                for video in wanted.videos
            ],
            "do_sample_frames": False,
        }
    text = processor.apply_chat_template(wanted.messages, add_generation_prompt=True, tokenize=False)
    return processor(text=[text], images=list(wanted.images) or None, return_tensors="pt", **videos)


VARIETY = [
    example("sum 3852="),
    example(picture(32, 8), "sum="),
    example("look: ", picture(32, 8, seed=1), " and ", picture(24, 40, seed=2), "sum=", system="be brief."),
    example(picture(37, 13, seed=3), "odd size"),
    example(picture(37, 13, seed=4), "odd size again"),
    example(picture(3, 5, seed=5), "scaled up"),
    example(picture(400, 300, seed=6), "scaled down"),
    example(picture(32, 8, "L", seed=7), picture(32, 8, "RGBA", seed=8), picture(32, 8, "P", seed=9), "modes"),
    example("max 9999=", system="be brief."),
    example(clip(4, 32, 8), "sum="),
    example("odd: ", clip(5, 21, 30, fps=23.976, seed=1, every=7), "srt=", system="be brief."),
    example(picture(24, 16, seed=10), clip(2, 16, 16, seed=2), picture(8, 8, seed=11), clip(6, 8, 24, 0.3, seed=3)),
    example(clip(4, 32, 8, seed=4), clip(4, 32, 8, seed=5), "of equal size"),
    example(clip(9, 300, 200, seed=6), "scaled down"),
]


def check_equal(processor: Any, builder: PromptBuilder, examples: list[Example]) -> None:
    prompts, refused = builder.build_many(examples, "mixed")
    assert not refused
    assert len(prompts) == len(examples)
    for prompt, wanted in zip(prompts, examples, strict=True):
        expected = plain(processor, wanted)
        assert prompt.token_ids == tuple(expected["input_ids"][0].tolist())
        if not (wanted.images or wanted.videos):
            assert prompt.media is None
            continue
        assert prompt.media is not None
        assert prompt.media.pixel_values.dtype == torch.float32
        order = [part["type"] == "video" for part in wanted.messages[-1]["content"] if part["type"] != "text"]
        assert prompt.media.videos == tuple(number for number, video in enumerate(order) if video)
        for video, names in (
            (False, ("pixel_values", "image_grid_thw")),
            (True, ("pixel_values_videos", "video_grid_thw")),
        ):
            pixels, grids = of_kind(prompt.media, video)
            if video in order:
                assert torch.equal(pixels, expected[names[0]])
                assert torch.equal(grids, expected[names[1]])
            assert bool(len(grids)) == (video in order)
        if "second_per_grid_ts" in expected:
            assert torch.equal(torch.tensor(prompt.media.seconds), expected["second_per_grid_ts"])


def of_kind(media: Media, video: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and grids of the videos, or of the images."""
    chosen = [number for number in range(len(media.grid_thw)) if (number in media.videos) == video]
    pixels = media.pixel_values.split(media.grid_thw.prod(1).tolist())
    return torch.cat([pixels[number] for number in chosen] or [torch.empty(0)]), media.grid_thw[chosen]


def test_a_batch_of_all_kinds_equals_the_plain_processor_call_on_each(processor: Any, builder: PromptBuilder) -> None:
    check_equal(processor, builder, VARIETY)


def test_prompts_of_qwen2_5_vl_equal_its_processors_call(processor: Any) -> None:
    """Its videos are one block, and how long a frame lasts is a number beside them."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    other = Qwen2_5_VLProcessor(
        image_processor=processor.image_processor,
        tokenizer=processor.tokenizer,
        video_processor=Qwen2VLVideoProcessor(**sizes, size={"shortest_edge": 64, "longest_edge": 64 * 256}),
        chat_template=processor.chat_template,
    )
    check_equal(other, PromptBuilder(other, max_prompt_tokens=8192), VARIETY)


def test_both_ways_of_processing_pictures_equal_the_plain_processor_call(
    processor: Any, builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for limit in (0, 1 << 30):
        monkeypatch.setattr("copd_megatron.data.patches.STACKED_PIXELS", limit)
        check_equal(processor, builder, VARIETY)


@pytest.mark.parametrize(("side", "stacked"), [(8, True), (400, False)])
def test_small_batches_are_stacked_and_large_ones_are_not(
    builder: PromptBuilder, monkeypatch: pytest.MonkeyPatch, side: int, stacked: bool
) -> None:
    seen: list[bool] = []
    image_processor = type(builder.processor.image_processor)
    process = image_processor.__call__

    def recorded(self: Any, **given: Any) -> Any:
        seen.append(given["disable_grouping"])
        return process(self, **given)

    monkeypatch.setattr(image_processor, "__call__", recorded)
    pictures = [example(picture(side, side, seed=seed)) for seed in range(2)]
    assert (2 * side * side <= STACKED_PIXELS) == stacked
    builder.build_many(pictures, "image")
    assert seen == [not stacked]


@pytest.mark.parametrize(("modality", "length"), [("text", 17), ("image", 18), ("video", 78)])
def test_mini_prompts_equal_the_plain_processor_call_and_have_one_length(
    processor: Any, builder: PromptBuilder, modality: Any, length: int
) -> None:
    source = MiniSource(MiniTask(), modality, "train", seed=0, size=32)
    examples = [source[index] for index in range(32)]
    check_equal(processor, builder, examples)
    prompts, _ = builder.build_many(examples, modality)
    assert {len(prompt.token_ids) for prompt in prompts} == {length}
    for prompt, origin in zip(prompts, examples, strict=True):
        assert (prompt.uid, prompt.answer, prompt.verifier) == (origin.uid, origin.answer, origin.verifier)
        assert prompt.capability == modality
        assert prompt.text.count(PAD) == len(origin.images)
        assert prompt.text.count("<|video_pad|>") == sum(len(video.frames) // 2 for video in origin.videos)
        assert prompt.text.endswith("<|im_start|>assistant\n")


def test_building_leaves_the_example_as_it_was(builder: PromptBuilder) -> None:
    one = example("look: ", picture(32, 8))
    before = copy.deepcopy(one.messages)
    builder.build(one, "image")
    assert one.messages == before


def test_a_prompt_owns_its_pixels(builder: PromptBuilder) -> None:
    prompts, _ = builder.build_many([example(picture(32, 8, seed=seed)) for seed in range(4)], "image")
    for prompt in prompts:
        assert prompt.media is not None
        pixels = prompt.media.pixel_values
        assert pixels.untyped_storage().nbytes() == pixels.numel() * pixels.element_size()


def test_a_video_beyond_the_limit_is_refused_before_it_is_decoded(processor: Any) -> None:
    long = example(Video.of((broken(32, 8),) * 6, 1.0), "sum=")
    builder = PromptBuilder(processor, max_prompt_tokens=60)
    with pytest.raises(DataError, match=r"prompt too long: \d+ tokens, 12 of them for 1 images and videos"):
        builder.build(long, "video")


def test_what_a_processor_announces_is_what_it_must_make(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(processor.video_processor)
    monkeypatch.setattr(kind, "get_num_of_video_patches", lambda *arguments: 8)
    with pytest.raises(DataError, match=r"made \[16\] patches of items of which it had announced \[8\]"):
        PromptBuilder(processor, max_prompt_tokens=99).build(example(clip(2, 32, 8), "sum="), "video")


def test_frames_of_a_video_are_no_larger_than_qwens_own_code_makes_them(processor: Any) -> None:
    roomy = copy.deepcopy(processor)
    roomy.video_processor.size["longest_edge"] = 10**7  # pixels of all frames together
    prompt = PromptBuilder(roomy, max_prompt_tokens=4096).build(example(clip(4, 320, 240), "what?"), "video")
    assert prompt.media is not None
    frames, rows, columns = prompt.media.grid_thw[0].tolist()
    patch = roomy.video_processor.patch_size
    # 768 tokens of 8 x 8 pixels, where 320 x 240 pixels would have been 1200.
    assert rows * columns * patch**2 <= 768 * (2 * patch) ** 2 < 320 * 240
    assert frames == 2


def test_nothing_becomes_nothing(builder: PromptBuilder) -> None:
    assert builder.build_many([], "text") == ([], [])


def test_a_prompt_beyond_the_limit_is_refused_and_one_at_the_limit_is_not(processor: Any) -> None:
    fits, too_long = example(picture(32, 8), "sum=", uid="fits"), example(picture(40, 8), "sum=", uid="too long")
    builder = PromptBuilder(processor, max_prompt_tokens=18)
    prompts, refused = builder.build_many([too_long, fits], "image")
    assert [prompt.uid for prompt in prompts] == ["fits"]
    assert [refusal.uid for refusal in refused] == ["too long"]
    message = "too long: prompt too long: 19 tokens, 5 of them for 1 images and videos; .* max_prompt_tokens is 18"
    with pytest.raises(DataError, match=message):
        builder.build(too_long, "image")


def test_a_prompt_beyond_the_limit_is_refused_before_its_picture_is_decoded(processor: Any) -> None:
    with pytest.raises(DataError, match="prompt too long"):
        PromptBuilder(processor, max_prompt_tokens=18).build(example(broken(400, 8), "sum="), "image")


def broken(width: int, height: int) -> Image.Image:
    """A picture whose file ends in the middle; it can be opened, but not decoded."""
    file = io.BytesIO()
    picture(width, height).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))


REFUSED = {
    "image cannot be decoded: image 2, ": lambda: example(picture(32, 8), broken(32, 8), "sum="),
    "image of unusable size: image 1, 1608 x 8": lambda: example(picture(1608, 8), "sum="),
    "media and messages differ: 1 images and 0 videos for 0 image and 0 video placeholders": lambda: Example(
        "u", [{"role": "user", "content": "sum="}], "1", "digits", images=(picture(32, 8),)
    ),
    "media and messages differ: 0 images and 0 videos for 1 image": lambda: example(f"sum{PAD}="),
    "media and messages differ: 0 images and 0 videos for 0 image and 1 video": lambda: example("sum<|video_pad|>="),
    "media and messages differ: 0 images and 1 videos for 0 image and 2 video": lambda: example(
        clip(2, 8, 8), "<|video_pad|>"
    ),
    "video of unusable size: video 2, 1 frames of 8 x 8": lambda: example(clip(2, 8, 8), clip(1, 8, 8)),
    "video of unusable size: video 1, 0 frames": lambda: example(Video((), 1.0, (), 0)),
    "video of unusable size: video 1, 2 frames of 2 sizes": lambda: example(
        Video.of((picture(8, 8), picture(16, 8)), 1.0)
    ),
    "video of unusable size: video 1, 2 frames of 1 sizes with 3 indices": lambda: example(
        Video((picture(8, 8), picture(8, 8)), 1.0, (0, 1, 2), 3)
    ),
    "video cannot be decoded: video 1, frame 2, ": lambda: example(Video.of((picture(32, 8), broken(32, 8)), 1.0)),
    "characters unknown to the tokenizer: ": lambda: example("Summe?"),
    "messages rejected by the chat template: content part of type 'audio'": lambda: Example(
        "u", [{"role": "user", "content": [{"type": "audio"}]}], "1", "digits"
    ),
    "messages rejected by the chat template: ": lambda: Example("u", [{"content": "no role"}], "1", "digits"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_become_a_prompt_is_refused_with_its_reason_and_spares_the_others(
    builder: PromptBuilder, reason: str
) -> None:
    wrong = REFUSED[reason]()
    prompts, refused = builder.build_many([VARIETY[1], wrong, VARIETY[0]], "mixed")
    assert [prompt.media is None for prompt in prompts] == [False, True]
    assert refused[0].uid == "u"
    assert refused[0].reason.startswith(reason)
    with pytest.raises(DataError, match=f"^u: {re.escape(reason)}"):
        builder.build(wrong, "mixed")


def test_a_demonstration_continues_its_prompt_as_the_chat_template_would(
    processor: Any, builder: PromptBuilder
) -> None:
    source = MiniSource(MiniTask(), "text", "cold_start", seed=0, size=20)
    for one in (source[index] for index in range(20)):
        assert one.response is not None
        whole = [*one.messages, {"role": "assistant", "content": one.response}]
        expected = processor.tokenizer(processor.apply_chat_template(whole, tokenize=False))["input_ids"]
        newline = processor.tokenizer("\n")["input_ids"]
        response = builder.response_token_ids(one.response)
        assert [*builder.build(one, "text").token_ids, *response, *newline] == expected
        assert len(response) <= 10
        assert processor.tokenizer.decode(response, skip_special_tokens=True) == one.response


def test_stop_tokens_are_those_of_the_generation_defaults_and_of_the_tokenizer(
    folder: Path, processor: Any, tmp_path: Path
) -> None:
    end, end_of_text = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert stop_token_ids(folder, processor.tokenizer) == (end,)
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": [{end}, {end_of_text}]}}')
    assert stop_token_ids(tmp_path, processor.tokenizer) == (end_of_text, end)
    assert stop_token_ids(tmp_path / "none", processor.tokenizer) == (end,)
    endless = copy.deepcopy(processor.tokenizer)
    endless.eos_token = None
    with pytest.raises(WeightsError, match=r"neither generation_config\.json nor the tokenizer"):
        stop_token_ids(tmp_path / "none", endless)


def test_a_folder_without_a_processor_for_images_is_refused(processor: Any, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no processor can be loaded"):
        load_processor(tmp_path)
    processor.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=re.escape(str(tmp_path))):
        load_processor(tmp_path)


def test_a_tokenizer_without_qwens_end_of_turn_is_refused(processor: Any) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    other = copy.copy(processor)
    other.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), unk_token="?"
    )
    with pytest.raises(WeightsError, match=re.escape("no token <|im_end|>")):
        PromptBuilder(other, max_prompt_tokens=8)
