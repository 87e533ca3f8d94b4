"""Small files of the schemas of the paper's data sets, loaded as configs/qwen3_vl_4b/paper.yaml says, to prompts and
judged answers. The rows are made up; only their form is the published one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from copd_megatron.config import RunConfig, load_config
from copd_megatron.data.example import Example
from copd_megatron.data.mini.model import build
from copd_megatron.data.prompts import PromptBuilder, load_processor
from copd_megatron.data.settings import SourceSettings
from copd_megatron.data.sources import open_source
from copd_megatron.rewards import verifier
from copd_megatron.rewards.verdict import Unparsable

PAPER = load_config(Path(__file__).parents[2] / "configs/qwen3_vl_4b/paper.yaml", [], RunConfig)
SETTINGS: dict[str, SourceSettings] = {
    **{f"{branch.name}/train": branch.data.train for branch in PAPER.branches if branch.data.train},
    **{f"{branch.name}/{name}": one for branch in PAPER.branches for name, one in branch.data.benchmarks.items()},
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths of the configuration are relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def picture(number: int = 0) -> Image.Image:
    return Image.new("RGB", (8 + 8 * number, 16), (255, 0, 0))


def jsonl(path: str, *rows: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def parquet(path: str, *rows: dict[str, Any], **features: Any) -> None:
    """The rows as `datasets` writes them; columns without a feature are texts."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    types = {name: features.get(name, datasets.Value("string")) for name in columns}
    datasets.Dataset.from_dict(columns, features=datasets.Features(types)).to_parquet(path)


def clip(path: str) -> None:
    import av

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 30 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


IMAGE, IMAGES, TEXTS = datasets.Image(), datasets.List(datasets.Image()), datasets.List(datasets.Value("string"))
INTEGER = datasets.Value("int64")
SEVEN = {f"image_{number}": IMAGE for number in range(1, 8)}


@dataclass(frozen=True)
class Case:
    """`write` puts the files where the configuration expects them. Of the examples that come of them: the user's text,
    with [image] and [video] for what stands there, a right response and a wrong one."""

    write: Callable[[], None]
    examples: tuple[tuple[str, str, str], ...]


def mmmu() -> None:
    blank = dict.fromkeys(SEVEN) | {"id": "validation_Math_1", "explanation": "", "img_type": "['Diagrams']"}
    rows = [
        blank
        | {
            "question": "Which of <image 2> fits <image 1>?",
            "options": "['<image 3>', '$\\\\frac{1}{2}$', \"b's\"]",
            "answer": "C",
            "question_type": "multiple-choice",
            "image_1": picture(),
            "image_2": picture(1),
            "image_3": picture(2),
        },
        blank
        | {
            "question": "<image 1> What is x?",
            "options": "[]",
            "answer": "0.5",
            "question_type": "open",
            "image_1": picture(),
        },
    ]
    for subject in ("Art", "Math"):
        parquet(f"data/mmmu/{subject}/validation-00000-of-00001.parquet", *rows, **SEVEN)


def own_videos() -> None:
    jsonl("data/videos_40k.jsonl", {"question": "Who?", "video": "clips/1.mp4", "answer": "B"})
    clip("data/clips/1.mp4")


MMMU = (
    "Which of [image] fits [image]?\nA. [image]\nB. $\\frac{1}{2}$\nC. b's",
    r"It is \boxed{C}.",
    r"It is \boxed{B}.",
)


def mathvista() -> None:
    rows = [
        {
            "pid": "1",
            "question": "Find y.",
            "image": "images/1.jpg",
            "decoded_image": picture(),
            "choices": ["4", "A", "B"],
            "unit": None,
            "precision": None,
            "answer": "B",
            "question_type": "multi_choice",
            "answer_type": "text",
            "query": "Hint: give the letter\nQuestion: Find y.\nChoices:\n(A) 4\n(B) A\n(C) B",
        },
        {
            "pid": "2",
            "question": "How long?",
            "image": "images/2.jpg",
            "decoded_image": picture(),
            "choices": None,
            "unit": "m",
            "precision": 1.0,
            "answer": "1.2",
            "question_type": "free_form",
            "answer_type": "float",
            "query": "Hint: one decimal place\nQuestion: How long? (Unit: m)",
        },
    ]
    parquet(
        "data/mathvista/data/testmini-00000-of-00001-725687bf7a18d64b.parquet",
        *rows,
        decoded_image=IMAGE,
        choices=TEXTS,
        precision=datasets.Value("float64"),
    )


def mathvision() -> None:
    rows = [
        {
            "id": "1",
            "question": "Which one?\n<image1>",
            "options": ["A", "B", "C"],
            "image": "images/1.jpg",
            "decoded_image": picture(),
            "answer": "B",
            "solution": None,
            "level": 2,
            "subject": "counting",
        },
        {
            "id": "2",
            "question": "How many? <image1>",
            "options": [],
            "image": "images/2.jpg",
            "decoded_image": picture(),
            "answer": "42",
            "solution": None,
            "level": 3,
            "subject": "counting",
        },
    ]
    for split in ("test", "testmini"):
        file = f"data/mathvision/data/{split}-00000-of-00001-3532b8d3f1b4047a.parquet"
        parquet(file, *rows, options=TEXTS, decoded_image=IMAGE, level=INTEGER)


def mathverse() -> None:
    row = {
        "sample_index": "1",
        "problem_index": "1",
        "problem_version": "Vision Only",
        "question": "",
        "image": picture(),
        "query_wo": "Directly answer the question.",
        "query_cot": "Reason, then give the answer.",
        "metadata": {"split": "testmini", "subject": "Plane Geometry"},
    }
    rows = (
        row | {"answer": "A", "question_type": "multi-choice"},
        row | {"answer": "4\\pi", "question_type": "free-form"},
    )
    metadata = {"split": datasets.Value("string"), "subject": datasets.Value("string")}
    parquet("data/mathverse/testmini.parquet", *rows, image=IMAGE, metadata=metadata)


def mmvu() -> None:
    row = {"id": "validation_0", "video_path": "videos/Art/0.mp4", "question": "Which school?"}
    choices = {"A": "Impressionism", "B": "Cubism", "C": "Dada", "D": "Fauvism", "E": "Futurism"}
    rows = [
        row | {"question_type": "multiple-choice", "answer": "B", "choices": choices},
        row | {"question_type": "open-ended", "answer": "Depth-first search", "choices": dict.fromkeys(choices, "")},
    ]
    types = {label: datasets.Value("string") for label in choices}
    parquet("data/mmvu/data/validation-00000-of-00001.parquet", *rows, choices=types)
    clip("data/mmvu/videos/Art/0.mp4")


def video_holmes() -> None:
    row = {"video ID": "8Vd8", "Question Type": "SR", "Answer": "B", "Explanation": "…", "Question": "Who are they?"}
    full = {letter: f"choice {letter}" for letter in "ABCDEF"}
    rows = [
        row | {"Question ID": 1, "Options": full},
        row | {"Question ID": 2, "Options": {letter: full[letter] for letter in "ABCD"}},
    ]
    clip("data/video_holmes/videos_cropped/8Vd8.mp4")
    Path("data/video_holmes/test_Video-Holmes.json").write_text(json.dumps(rows))


def mvbench() -> None:
    jsonl(
        "data/mvbench/mvbench.jsonl",
        {
            "video": "clevrer/video_validation/1.mp4",
            "question": "How many?",
            "candidates": ["3", "5", "A"],
            "answer": "5",
        },
    )
    clip("data/mvbench/clevrer/video_validation/1.mp4")


def videomathqa() -> None:
    row = {
        "question_id": "1",
        "videoID": "0Xab",
        "question": "How far?",
        "options": ["A) 3 m", "B) 4 m"],
        "answer": "B",
        "category": "Counting",
        "length": "short",
    }
    parquet("data/videomathqa/videomathqa_mcq_test.parquet", row, options=TEXTS)
    clip("data/videomathqa/videos/0Xab.mp4")


def competition(path: str, **more: Any) -> Callable[[], None]:
    row = {"problem": "Find $x$.", "answer": "204", **more}
    if path.endswith(".jsonl"):
        return lambda: jsonl(path, row)
    return lambda: parquet(path, row)


CHOICE = r"Because of this, \boxed{B}.", r"\boxed{C}"
NUMBER = "Find $x$.", r"So $x = \boxed{204}$.", r"\boxed{205}"
CASES = {
    "text/train": Case(competition("data/polaris_53k/polaris-data-53K.parquet", difficulty="3/8"), (NUMBER,)),
    "text/AIME24": Case(
        competition("data/aime_2024/data/train-00000-of-00001.parquet", id="60", solution="…", url="…", year="2024"),
        (NUMBER,),
    ),
    "text/AIME25": Case(competition("data/aime_2025.jsonl", id="0"), (NUMBER,)),
    "text/HMMT25": Case(
        competition("data/hmmt_feb_2025/data/train-00000-of-00001.parquet", problem_idx="1"),
        (NUMBER,),
    ),
    "text/MATH-500": Case(
        lambda: jsonl(
            "data/math_500.jsonl",
            {
                "problem": "Convert.",
                "solution": "…",
                "subject": "Precalculus",
                "level": 2,
                "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
                "unique_id": "test/1.json",
            },
        ),
        (("Convert.", r"\boxed{(3, \pi/2)}", r"\boxed{(3, \pi)}"),),
    ),
    "text/Minerva": Case(
        lambda: jsonl("data/minerva.jsonl", {"question": "What diameter?", "answer": "1.6"}),
        (("What diameter?", r"\boxed{1.6}", r"\boxed{16}"),),
    ),
    "image/train": Case(
        lambda: parquet(
            "data/mmfinereason/data/train-00000-of-00018.parquet",
            {"question": "See <image> What?", "answer": "B", "image": picture(), "source": "x", "id": "1"},
            {"question": "<image>\nHow many?", "answer": None, "image": picture(), "source": "x", "id": "2"},
            {"question": "<image>\nHow many?", "answer": "\\frac{3}{4}", "image": picture(), "source": "x", "id": "3"},
            image=IMAGE,
        ),
        (("See [image] What?", *CHOICE), ("[image]\nHow many?", r"\boxed{0.75}", r"\boxed{4}")),
    ),
    "image/MMMU": Case(
        mmmu,
        (MMMU, ("[image] What is x?", r"\boxed{\frac{1}{2}}", r"\boxed{2}")) * 2,
    ),
    "image/MMMU-Pro": Case(
        lambda: parquet(
            "data/mmmu_pro/standard (10 options)/test-00000-of-00002.parquet",
            dict.fromkeys(SEVEN)
            | {
                "id": "test_1",
                "question": "<image 1> Which?",
                "answer": "J",
                "options": str([f"x{n}" for n in range(10)]),
                "image_1": picture(),
            },
            **SEVEN,
        ),
        (
            (
                "[image] Which?\n" + "\n".join(f"{letter}. x{n}" for n, letter in enumerate("ABCDEFGHIJ")),
                r"\boxed{J}",
                r"\boxed{A}",
            ),
        ),
    ),
    "image/MathVista": Case(
        mathvista,
        (
            (
                "[image]Hint: give the letter\nQuestion: Find y.\nChoices:\n(A) 4\n(B) A\n(C) B",
                r"\boxed{C}",
                r"\boxed{B}",
            ),
            ("[image]Hint: one decimal place\nQuestion: How long? (Unit: m)", r"\boxed{1.2}", r"\boxed{1.3}"),
        ),
    ),
    "image/MathVision": Case(
        mathvision,
        (
            ("[image]Which one?\n<image1>\nA. A\nB. B\nC. C", *CHOICE),
            ("[image]How many? <image1>", r"\boxed{42}", r"\boxed{24}"),
        ),
    ),
    "image/ZeroBench (sub)": Case(
        lambda: parquet(
            "data/zerobench/data/zerobench_subquestions-00000-of-00001.parquet",
            {
                "question_id": "1_1",
                "question_text": "How much?",
                "question_answer": "11.90",
                "question_images_decoded": [picture(), picture(1)],
            },
            question_images_decoded=IMAGES,
        ),
        (("[image][image]How much?", r"\boxed{11.90}", r"\boxed{11.80}"),),
    ),
    "image/WeMath": Case(
        lambda: parquet(
            "data/wemath/data/testmini-00000-of-00001.parquet",
            {
                "ID": "1",
                "key": "2steps_1",
                "question number": "1",
                "knowledge concept": "Angles",
                "question": "What is it? (   )",
                "option": "A. 3; B. 4; C. No correct answer",
                "answer": "B",
                "image_path": picture(),
            },
            image_path=IMAGE,
        ),
        (("[image]What is it? (   )\nA. 3; B. 4; C. No correct answer", *CHOICE),),
    ),
    "image/MathVerse": Case(
        mathverse,
        (
            ("[image]Reason, then give the answer.", r"\boxed{A}", r"\boxed{B}"),
            ("[image]Reason, then give the answer.", r"\boxed{4\pi}", r"\boxed{4}"),
        ),
    ),
    "video/train": Case(own_videos, (("[video]Who?", *CHOICE),)),
    "video/Video-Holmes": Case(
        video_holmes,
        tuple(
            ("[video]Who are they?\n" + "\n".join(f"{one}. choice {one}" for one in letters), *CHOICE)
            for letters in ("ABCDEF", "ABCD")
        ),
    ),
    "video/MVBench": Case(mvbench, (("[video]How many?\nA. 3\nB. 5\nC. A", *CHOICE),)),
    "video/MMVU": Case(
        mmvu,
        (("[video]Which school?\nA. Impressionism\nB. Cubism\nC. Dada\nD. Fauvism\nE. Futurism", *CHOICE),),
    ),
    "video/VideoMathQA": Case(videomathqa, (("[video]How far?\nA) 3 m\nB) 4 m", *CHOICE),)),
}


def user_text(example: Example) -> str:
    assert [message["role"] for message in example.messages] == ["system", "user"]
    content = example.messages[1]["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in parts)


def judged(example: Example, response: str) -> float:
    try:
        return verifier(example.verifier)(response, example.answer)
    except Unparsable:
        return 0.0


def test_every_source_of_the_configuration_has_a_schema() -> None:
    assert set(CASES) == set(SETTINGS)


@pytest.mark.parametrize("name", CASES)
def test_file_of_the_published_schema_gives_prompts_and_judged_answers(name: str) -> None:
    case = CASES[name]
    case.write()
    source = open_source(SETTINGS[name])
    assert len(source) == len(case.examples)
    for example, (text, right, wrong) in zip(source, case.examples, strict=True):
        assert user_text(example) == text
        assert (text.count("[image]"), text.count("[video]")) == (len(example.images), len(example.videos))
        assert judged(example, f"<think>First {wrong}?</think>\n{right}") == 1.0
        assert judged(example, wrong) == 0.0
        assert judged(example, "I do not know") == 0.0


def test_rows_that_cannot_be_judged_are_counted() -> None:
    for name, reason in (("image/train", "field"), ("video/MMVU", "options")):
        CASES[name].write()
        assert open_source(SETTINGS[name]).skipped == {reason: 1}


def test_images_stand_in_the_order_in_which_a_text_names_them() -> None:
    CASES["image/MMMU"].write()
    assert [image.width for image in open_source(SETTINGS["image/MMMU"])[0].images] == [16, 8, 24]


def test_prompts_have_the_texts_the_images_and_the_videos(tmp_path: Path) -> None:
    build(tmp_path / "mini", seed=0)
    processor = load_processor(tmp_path / "mini")
    # The mini model reads digits and a few words; here it gets every character.
    processor.tokenizer.add_tokens([chr(code) for code in (*range(32, 127), 10)])
    builder = PromptBuilder(processor, max_prompt_tokens=4096)
    for name in ("text/MATH-500", "image/MMMU", "video/MMVU"):
        CASES[name].write()
        example = open_source(SETTINGS[name])[0]
        (prompt,), refused = builder.build_many([example], "any")
        assert not refused
        assert "put the final answer within \\boxed{}" in prompt.text
        assert (prompt.media is None) == (not example.images and not example.videos)
