from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from copd_megatron.evaluate.intervals import mean_of, wilson
from copd_megatron.evaluate.results import BenchmarkResult, CapabilityResult, ModelResult
from copd_megatron.evaluate.table import AccuracyTable
from copd_megatron.observe.report_tables import benchmark_table
from copd_megatron.observe.results import read_evaluation

TASK = "mini suite: 4 digits; SYNTHETIC: srt ascends in text and descends in images"


def part(name: str, accuracy: float, **changes: object) -> BenchmarkResult:
    settings = {
        "problems": 100,
        "distinct": 90 if name == "text" else 100,
        "samples": 1,
        "truncated": 0.012,
        "mean_length": 8.25,
        "verdicts": {"ok": 100},
        "groups": {"sum": wilson(accuracy, 50), "srt": wilson(accuracy, 50)},
    }
    return BenchmarkResult(name, wilson(accuracy, 100), **{**settings, **changes})  # type: ignore[arg-type]


def result(capability: str, accuracy: float, **changes: object) -> CapabilityResult:
    return CapabilityResult(capability, (part(capability, accuracy, **changes),))


def several() -> AccuracyTable:
    """Text with two benchmarks, image with one."""
    text = CapabilityResult(
        "text", (part("text/AIME24", 0.2, problems=30, samples=16), part("text/MATH-500", 0.8, refused=2))
    )
    return table(models=(ModelResult("base", (text, result("image", 0.2))),))


def table(**changes: object) -> AccuracyTable:
    models = (
        ModelResult("base", (result("text", 0.4), result("image", 0.2))),
        ModelResult("merged", (result("text", 0.7), result("image", 0.6, verdicts={"ok": 98, "timeout": 2}))),
    )
    settings = {"task": TASK, "models": models, "samples": 1, "seed": 3, "notes": ("method copd",)}
    return AccuracyTable(**{**settings, **changes})  # type: ignore[arg-type]


def printed(content: RenderableType | None) -> str:
    assert content is not None
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(content)
    return console.export_text()


def test_the_overall_accuracy_is_the_unweighted_mean() -> None:
    assert table().models[0].overall.accuracy == pytest.approx(0.3)


def test_a_row_shows_accuracies_with_their_intervals() -> None:
    low, high = wilson(0.4, 100).low, wilson(0.4, 100).high
    for text in (printed(table().rich()), table().markdown()):
        line = next(line for line in text.splitlines() if "base" in line)
        assert f"40.0 [{100 * low:.1f}, {100 * high:.1f}]" in line
        assert "30.0 [" in line
    assert "8.2/8.2" in table().markdown()
    assert "1.2%/1.2%" in table().markdown()


@pytest.mark.parametrize("names", [("text", "image"), ("text", "image", "video")])
def test_table_fits_a_terminal_of_80_columns(names: tuple[str, ...]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    models = (ModelResult("image branch", tuple(result(name, 0.4) for name in names)),)
    console.print(table(models=models).rich())
    shown = console.export_text()
    assert "…" not in shown
    low, high = wilson(0.4, 100).low, wilson(0.4, 100).high
    assert shown.count(f"[{100 * low:.1f}, {100 * high:.1f}]") == len(names)


def test_every_form_says_what_was_asked_how_often_and_how() -> None:
    for text in (printed(table().rich()), table().markdown()):
        assert TASK in text
        assert "problems: image 100, text 100 (90 different); greedy; seed 3" in text
        assert "Wilson" in text
        assert "method copd" in text
        assert "merged, image: 2 x timeout" in text
    assert "avg@4, 4 samples per problem" in table(samples=4).markdown()


def test_problems_left_out_are_stated() -> None:
    models = (ModelResult("base", (result("text", 0.4, refused=3),)),)
    assert "base, text: 3 problems could not be used" in table(models=models).markdown()


def test_markdown_is_a_table_of_equal_rows() -> None:
    lines = [line for line in table().markdown().splitlines() if line.startswith("|")]
    assert lines[0] == "| model | text | image | overall | length | cut off |"
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {7}


def test_the_report_reads_what_the_table_writes(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(table().json()))
    evaluation = read_evaluation(tmp_path)
    assert evaluation is not None
    assert (evaluation.task, evaluation.n, evaluation.seed) == (TASK, 100, 3)
    merged = evaluation.models[1]
    assert merged.name == "merged"
    assert merged.capabilities["image"].accuracy == 0.6
    assert merged.capabilities["image"].low == wilson(0.6, 100).low
    assert merged.overall is not None
    assert merged.overall.accuracy == pytest.approx(0.65)
    assert "method copd" in evaluation.notes


def test_json_holds_the_details_of_a_capability() -> None:
    detail = table().json()["models"][1]["capabilities"]["image"]
    assert detail["verdicts"] == {"ok": 98, "timeout": 2}
    assert detail["truncated"] == 0.012
    assert detail["groups"]["sum"]["high"] == wilson(0.6, 50).high


def test_the_breakdown_has_a_row_per_kind_and_a_column_per_model() -> None:
    text = printed(table().breakdown())
    line = next(line for line in text.splitlines() if "image srt" in line)
    assert "20.0 [" in line
    assert "60.0 [" in line
    plain = (ModelResult("base", (result("text", 0.4, groups={}),)),)
    assert table(models=plain).breakdown() is None


def test_models_tested_on_other_capabilities_do_not_share_a_table() -> None:
    models = (ModelResult("base", (result("text", 0.4),)), ModelResult("merged", (result("image", 0.4),)))
    with pytest.raises(ValueError, match=r"merged was tested on \('image',\), base on \('text',\)"):
        table(models=models)


def test_several_benchmarks_are_a_capability_by_their_unweighted_mean() -> None:
    base = several().models[0]
    assert base.capabilities[0].estimate.accuracy == pytest.approx(0.5)
    assert base.overall.accuracy == pytest.approx((0.2 + 0.8 + 0.2) / 3), "over benchmarks, not over capabilities"
    assert base.overall == mean_of([wilson(accuracy, 100) for accuracy in (0.2, 0.8, 0.2)])
    assert several().header == table().header


def test_benchmarks_are_a_second_table() -> None:
    for text in (printed(several().rich()), several().markdown()):
        line = next(line for line in text.splitlines() if "text/MATH-500" in line)
        assert "80.0 [" in line
        assert "samples per problem (avg@n): text/AIME24 16; the others greedy" in text
        assert "problems: image 100, text/AIME24 30, text/MATH-500 100" in text
        assert "Wilson's per benchmark" in text
        assert "base, text/MATH-500: 2 problems could not be used" in text
    assert "benchmark" not in table().markdown()


def test_the_report_reads_benchmarks_too(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(several().json()))
    evaluation = read_evaluation(tmp_path)
    assert evaluation is not None
    assert evaluation.size == "at most 100 problems per benchmark"
    text = evaluation.models[0].capabilities["text"]
    assert (text.accuracy, list(text.benchmarks)) == (pytest.approx(0.5), ["AIME24", "MATH-500"])
    shown = benchmark_table(evaluation.models)
    assert shown is not None
    assert [row[0] for row in shown.rows] == ["text/AIME24", "text/MATH-500"]
    assert several().json()["models"][0]["capabilities"]["text"]["benchmarks"]["AIME24"]["samples"] == 16
    assert set(several().outcomes()["base"]) == {"text/AIME24", "text/MATH-500", "image"}
    (tmp_path / "evaluation.json").write_text(json.dumps(table().json()))
    plain = read_evaluation(tmp_path)
    assert plain is not None
    assert (plain.size, benchmark_table(plain.models)) == ("100 problems per capability", None)
