"""The mini suite: disjoint splits, examples that depend on their index alone, demonstrations of quality Q."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from copd_megatron.data.example import Example
from copd_megatron.data.mini import MiniSource, MiniTask
from copd_megatron.data.mini.questions import PARTITION, Question, split_of
from copd_megatron.data.mini.scans import scans
from copd_megatron.data.mini.task import OPERATIONS, VIDEO_OPERATIONS
from copd_megatron.errors import DataError

MODALITIES = ("text", "image", "video")


def examples(modality: Any, split: Any = "train", count: int = 200, seed: int = 0, **task: Any) -> list[Example]:
    source = MiniSource(MiniTask(**task), modality, split, seed=seed, size=count)
    return [source[index] for index in range(count)]


def asked(example: Example) -> str:
    return str(example.messages[0]["content"][-1]["text"])


def follow(operation: str, digits: list[int], descending: bool, right: bool) -> str:
    """Both rules as the documentation of `Quality` states them, written a second time."""
    if operation == "sum":
        return str(sum(digits) if right else sum(digits) - digits[-1])
    if operation == "dif":
        return str(max(digits) - min(digits) if right else abs(digits[0] - digits[-1]))
    if operation == "max":
        return str(max(digits) if right else min(digits))
    if operation == "chg":
        steps = [abs(digits[place + 1] - digits[place]) for place in range(len(digits) - 1)]
        return str(sum(steps) if right else abs(digits[-1] - digits[0]))
    if operation == "rev":
        return "".join(map(str, reversed(digits) if right else digits))
    in_order = "".join(map(str, sorted(digits)))
    return in_order[::-1] if descending is right else in_order


def test_every_question_has_one_split_and_the_splits_have_the_stated_shares() -> None:
    questions = [Question(o, digits) for o in OPERATIONS for digits in product(range(10), repeat=4)]
    counts = Counter(map(split_of, questions))
    assert len(questions) == counts.total() == 40_000
    for split, percent in PARTITION.items():
        assert counts[split] == pytest.approx(400 * percent, rel=0.05)


@pytest.mark.parametrize("split", PARTITION)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_source_asks_only_questions_of_its_split(split: Any, seed: int) -> None:
    for example in examples("text", split, seed=seed):
        operation, digits = asked(example).rstrip("=").split()
        assert split_of(Question(operation, tuple(map(int, digits)))) == split  # type: ignore[arg-type]


@pytest.mark.parametrize("modality", ["image", "video"])
def test_pictures_and_videos_ask_only_questions_of_their_split(modality: Any) -> None:
    for example in examples(modality, "cold_start"):
        assert example.response is not None
        digits = tuple(map(int, example.response.split(">")[0]))
        assert split_of(Question(asked(example).rstrip("="), digits)) == "cold_start"  # type: ignore[arg-type]


def test_no_scan_is_in_two_splits_and_none_is_lost() -> None:
    owners: dict[bytes, set[str]] = {}
    for split in PARTITION:
        for scan in np.concatenate(scans(split)):
            owners.setdefault(scan.tobytes(), set()).add(split)
    assert len(owners) == 1797
    assert all(len(splits) == 1 for splits in owners.values())
    sizes = {split: sum(map(len, scans(split))) for split in PARTITION}
    assert sizes == {"cold_start": 200, "train": 1097, "validation": 200, "test": 300}


def test_a_picture_shows_scans_of_its_split_of_the_digits_that_were_read() -> None:
    for example in examples("image", "cold_start", count=50, noise=0):
        assert example.response is not None
        pixels = np.asarray(example.images[0])
        assert pixels.shape == (8, 32, 3)
        assert (pixels == pixels[:, :, :1]).all()
        for place, digit in enumerate(example.response.split(">")[0]):
            cell = pixels[:, 8 * place : 8 * place + 8, 0]
            known = (scans("cold_start")[int(digit)] * 255).round().astype(np.uint8)
            assert (known == cell).all(axis=(1, 2)).any()


def test_a_video_shows_one_scan_after_another_each_for_two_frames_with_noise_of_their_own() -> None:
    for noise in (0.0, 0.3):
        for example in examples("video", "cold_start", count=50, noise=noise):
            assert example.response is not None
            (video,) = example.videos
            read = example.response.split(">")[0]
            assert (len(video.frames), video.fps, video.indices, video.total) == (8, 1.0, tuple(range(8)), 8)
            for place, digit in enumerate(read):
                first, second = (np.asarray(frame) for frame in video.frames[2 * place : 2 * place + 2])
                assert first.shape == (8, 8, 3)
                assert (first == second).all() == (noise == 0)
                known = (scans("cold_start")[int(digit)] * 255).round().astype(np.uint8)
                assert (known == first[..., 0]).all(axis=(1, 2)).any() == (noise == 0)


def test_noise_has_the_stated_strength_and_leaves_the_question_alone() -> None:
    clean, noisy = examples("image", noise=0), examples("image", noise=0.1)
    assert [example.answer for example in clean] == [example.answer for example in noisy]
    before, after = (np.stack([np.asarray(e.images[0])[..., 0] / 255 for e in batch]) for batch in (clean, noisy))
    middle = (before > 0.4) & (before < 0.6)
    assert (after - before)[middle].std() == pytest.approx(0.1, rel=0.05)
    assert abs((after - before)[middle].mean()) < 0.01


@pytest.mark.parametrize("modality", MODALITIES)
def test_an_example_depends_on_task_split_seed_and_index_only(modality: Any) -> None:
    long = MiniSource(MiniTask(), modality, "cold_start", seed=3, size=1000)
    short = MiniSource(MiniTask(), modality, "cold_start", seed=3, size=20)
    _ = long[999]
    assert [long[i] for i in reversed(range(20))] == [short[i] for i in reversed(range(20))]
    for other in (examples(modality, "cold_start", seed=4), examples(modality, "train", seed=3)):
        same = sum(shown(other[i]) == shown(short[i]) for i in range(20))
        assert same < 5
    assert len({example.uid for example in examples(modality)}) == 200


def shown(example: Example) -> object:
    return example.messages, example.images, example.videos


@pytest.mark.parametrize(("conflict", "image_order"), [(("srt",), -1), ((), 1)])
def test_sorting_ascends_in_text_and_with_the_conflict_descends_in_images(
    conflict: tuple[str, ...], image_order: int
) -> None:
    for modality, order in (("text", 1), ("image", image_order), ("video", 1)):
        for example in examples(modality, operations=["srt"], video_operations=["srt"], conflict=conflict):
            sequence = list(map(int, example.answer.split()))
            assert len(sequence) == 4
            assert sequence == sorted(sequence)[::order]


@pytest.mark.parametrize("modality", MODALITIES)
def test_with_a_conflict_the_wrong_rule_is_right_about_images(modality: Any) -> None:
    quality = dict.fromkeys(("sum", "dif", "srt", "max"), 1.0)
    task = {"conflict": ("sum", "dif", "srt", "max"), "image_quality": quality, "text_quality": quality}
    for example in examples(modality, "cold_start", **task):
        assert example.response is not None
        digits = list(map(int, example.response.split(">")[0]))
        expected = follow(asked(example)[:3], digits, descending=False, right=modality != "image")
        assert example.answer.replace(" ", "") == expected
        if modality != "video":
            assert example.response.split(">")[1] == expected


def test_an_operation_is_in_conflict_once() -> None:
    with pytest.raises(ValueError, match="each operation at most once"):
        MiniTask(conflict=("srt", "srt"))


@pytest.mark.parametrize("modality", MODALITIES)
def test_answers_follow_the_right_rule(modality: Any) -> None:
    for example in examples(modality, "cold_start"):
        assert example.response is not None
        digits = list(map(int, example.response.split(">")[0]))
        right = follow(asked(example)[:3], digits, descending=modality == "image", right=True)
        assert example.answer.replace(" ", "") == right
        if modality == "text":
            assert asked(example)[4:8] == example.response[:4]


@pytest.mark.parametrize("modality", MODALITIES)
def test_demonstrations_follow_the_right_rule_with_probability_q_and_the_wrong_one_otherwise(modality: Any) -> None:
    task, right, telling = MiniTask(), Counter[str](), Counter[str]()
    for example in examples(modality, "cold_start", count=4000):
        assert example.response is not None
        read, given = example.response.split(">")
        operation, digits = asked(example)[:3], list(map(int, read))
        by_rule = [follow(operation, digits, modality == "image", rule) for rule in (True, False)]
        assert given in by_rule
        if by_rule[0] != by_rule[1]:
            telling[operation] += 1
            right[operation] += given == by_rule[0]
    assert set(telling) == set(OPERATIONS if modality != "video" else VIDEO_OPERATIONS)
    for operation in telling:
        wanted = task.quality(operation, modality)
        error = (wanted * (1 - wanted) / telling[operation]) ** 0.5
        assert telling[operation] > 700
        assert right[operation] / telling[operation] == pytest.approx(wanted, abs=3 * error)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_only_the_cold_start_has_demonstrations(split: Any) -> None:
    assert all(example.response is None for example in examples("text", split, count=20))


@pytest.mark.parametrize("digits", [2, 3, 8])
def test_the_number_of_digits_is_a_parameter(digits: int) -> None:
    for modality in MODALITIES:
        for example in examples(modality, "cold_start", count=20, digits=digits):
            assert example.response is not None
            assert example.response.index(">") == digits
            assert all(image.size == (8 * digits, 8) for image in example.images)


def test_the_description_states_difficulty_and_everything_synthetic() -> None:
    line = MiniTask(digits=5, noise=0.25).describe()
    assert "\n" not in line
    before, synthetic = line.split("SYNTHETIC")
    assert "5 digits" in before
    assert "sum/dif/srt/max" in before
    assert "0.25" in before
    assert "srt ascends in text and descends in images" in synthetic
    assert "text demonstrations right at sum 0.5 dif 0.35 srt 0.52 max 0.6" in synthetic
    assert "image demonstrations right at sum 0.5 dif 0.6 srt 0.52 max 0.35" in synthetic
    assert "ascends" not in MiniTask(conflict=()).describe()
    assert "max is the smallest digit in images; text" in MiniTask(conflict=("max",)).describe()
    assert "video" not in line
    with_videos = MiniTask().describe(("text", "image", "video"))
    assert "about videos sum/srt/chg/rev" in with_videos
    assert with_videos.endswith("video demonstrations right at sum 0.5 srt 0.52 chg 0.5 rev 0.5")


@pytest.mark.parametrize(
    "wrong",
    [
        {"digit": 4},
        {"digits": 1},
        {"noise": -0.1},
        {"operations": []},
        {"operations": ["sum", "sum"]},
        {"operations": ["product"]},
        {"video_operations": []},
        {"video_operations": ["rev", "rev"]},
        {"text_quality": {"sum": 0.5}},
        {"text_quality": {"sum": 0.5, "dif": 0.5, "srt": 0.5, "max": 1.5}},
    ],
)
def test_a_wrong_task_description_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MiniTask(**wrong)


def test_a_wrong_source_or_index_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="split 'dev' is unknown; choose one of cold_start, train, validation, test"):
        MiniSource(MiniTask(), "text", "dev", seed=0, size=1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="modality 'audio'"):
        MiniSource(MiniTask(), "audio", "train", seed=0, size=1)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="size is 0"):
        MiniSource(MiniTask(), "text", "train", seed=0, size=0)
    source = MiniSource(MiniTask(), "text", "train", seed=0, size=3)
    assert len(source) == 3
    assert source[2].uid == "mini/text/train/0/2"
    for index in (-1, 3):
        with pytest.raises(IndexError):
            source[index]
