"""The growth tables: real gangs, layouts that do not fit are named, and nothing unequal is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_growth
import bench_growth_worker
import pytest
from bench_growth import BEGIN, END, check_same, layouts, tables, write_tables
from bench_growth_worker import Case, kind_of, measure, resident_peak_mib
from bench_model import Shape, write_model

SHAPE = Shape(hidden=32, layers=2, heads=4, groups=2, head_dim=16, mlp=48, vocabulary=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growth")
    write_model(path, SHAPE)
    return path


def case(folder: Path, **layout: int) -> Case:
    return Case(str(folder), SHAPE.vocabulary, 2, 8, 16, 1, "fp32", layout)


def check_measured(row: dict[str, Any]) -> None:
    assert len(row["seconds"]) == 1
    assert row["tokens_per_second_per_process"] == pytest.approx(16 / row["seconds"][0])
    assert min(row["peak_mib"], row["before_model_mib"]) > 0
    assert sum(row["split"].values()) == pytest.approx(1, abs=0.05)
    assert row["split"]["matrix products"] > 0


def test_one_process_reports_time_memory_and_split(folder: Path) -> None:
    row = measure(case(folder))
    check_measured(row)
    assert row["split"]["communication"] < 0.01


@pytest.mark.slow
def test_two_processes_compute_what_one_does(folder: Path) -> None:
    alone = {"name": "alone", **bench_growth.run(case(folder), timeout=200)}
    pair = {"name": "pair", **bench_growth.run(case(folder, world=2, tp=2), timeout=200)}
    check_same([alone], pair, 1e-5)
    for each in (alone, pair):
        check_measured(each)
        assert each["peak_mib"] > each["before_model_mib"], "fresh processes grow"
    assert alone["split"]["communication"] < 0.01 < pair["split"]["communication"]


def test_layout_that_does_not_divide_the_model_is_skipped_with_the_reason(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_growth_worker.py", case(folder, world=2, pp=2, cp=2).text()])
    bench_growth_worker.main()
    assert "cannot be divided into replicas" in json.loads(capsys.readouterr().out)["skipped"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("import sys; sys.exit('no such model')", {"failed": "no such model"}),
        (
            "import os, time; time.sleep(60 * int(os.environ['RANK'])) or 1 / 0",
            {"failed": "ZeroDivisionError: division by zero"},
        ),
        ("import time; time.sleep(60)", {"failed": "no result after 3 s"}),
        ("print('noise'); print('{\"skipped\": \"no\"}')", {"skipped": "no"}),
        ("import os; print('{\"peak_mib\": %s}' % os.environ['RANK'])", {"peak_mib": 1}),
    ],
)
def test_what_the_processes_say_becomes_one_row(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: dict[str, Any]
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(bench_growth, "WORKER", worker)
    assert bench_growth.run(case(folder, world=2), timeout=3) == expected


def test_every_kind_of_parallelism_is_tried() -> None:
    assert layouts([1, 2]) == [
        ("one process", {}),
        ("data parallel, dp = 2", {"world": 2}),
        ("tensor parallel, tp = 2", {"world": 2, "tp": 2}),
        ("pipeline parallel, pp = 2", {"world": 2, "pp": 2}),
        ("context parallel, cp = 2", {"world": 2, "cp": 2}),
    ]


@pytest.mark.parametrize("wrong", [{"loss": 2.01}, {"grad_norm": 1.1}, {"loss": float("nan")}])
def test_a_layout_that_computes_something_else_stops_the_benchmark(wrong: dict[str, float]) -> None:
    right = {"name": "one", "loss": 2.0, "grad_norm": 1.0}
    check_same([{"name": "none", "skipped": "x"}, right], {**right, "name": "two"}, 1e-4)
    with pytest.raises(SystemExit, match="two has"):
        check_same([right], {**right, "name": "two", **wrong}, 1e-4)


def test_operators_are_told_apart() -> None:
    kinds = {name: kind_of(name) for name in ("aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu",
                                              "gloo:all_reduce", "aten::silu", "nvjet_tst_128x256", "gloo:barrier",
                                              "ncclDevKernel_AllReduce_Sum_f32")}  # fmt: skip
    assert list(kinds.values()) == [
        "matrix products", "attention", "communication", "rest", "matrix products", "rest", "communication",
    ]  # fmt: skip


def test_peak_memory_can_be_measured_anew() -> None:
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    high = resident_peak_mib()
    del block
    if resident_peak_mib(reset=True) > high - 32:
        pytest.skip("the kernel does not reset the peak")
    assert resident_peak_mib() < high


def row(**more: Any) -> dict[str, Any]:
    split = {"communication": 0.0, "attention": 0.1, "matrix products": 0.6, "rest": 0.3}
    return {"seconds": [0.1], "tokens_per_second_per_process": 1000.0, "peak_mib": 600.0, "memory": "resident",
            "before_model_mib": 500.0, "split": split, **more}  # fmt: skip


RESULT = {
    "model": "a model", "precision": "fp32", "machine": "m, 1 cores", "cores": 1, "torch": "2", "date": "2000-01-01",
    "steps": 1, "sequences": 2, "length": 8, "tokens": 64,
    "processes": [
        row(name="one process", processes=1),
        row(name="dp = 2", processes=2, tokens_per_second_per_process=800.0),
        {"name": "tp = 2", "processes": 2, "skipped": "tp does not divide"},
    ],
    "lengths": [row(length=4096, sequences=1, gflops_per_second=12.34)],
}  # fmt: skip


def test_tables_show_growth_limits_and_what_did_not_run() -> None:
    text = tables(RESULT)
    assert "| dp = 2 | 800 | 80 % | 600 | 500 | 0 % | 10 % | 60 % | 30 % | matrix products |" in text
    assert "| tp = 2 | not run: tp does not divide |" in text
    assert "More processes than the 1 cores, which they share: dp = 2" in text
    assert "| 4,096 | 1 | 1,000 | 12.3 |" in text
    for block in text.split("\n\n"):
        columns = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(columns) <= 1, block


def test_tables_take_the_place_between_the_markers(tmp_path: Path) -> None:
    doc = tmp_path / "doc.md"
    doc.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_tables(doc, "new\n")
    assert doc.read_text() == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    doc.write_text("no place")
    with pytest.raises(SystemExit, match="once each"):
        write_tables(doc, "new\n")
    assert doc.read_text() == "no place"


def test_the_document_has_the_place() -> None:
    text = (Path(bench_growth.__file__).parents[1] / "docs" / "performance.md").read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


def test_command_writes_json_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doc, out = tmp_path / "doc.md", tmp_path / "growth.json"
    doc.write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(bench_growth, "run", lambda case, timeout: row(loss=1.0, grad_norm=1.0))
    arguments = ["--worlds", "1", "2", "--lengths", "16", "--json", str(out), "--doc", str(doc), "--hidden", "32"]
    monkeypatch.setattr(sys, "argv", ["bench_growth.py", *arguments])
    bench_growth.main()
    result = json.loads(out.read_text())
    assert [each["processes"] for each in result["processes"]] == [1, 2, 2, 2, 2]
    assert result["lengths"][0]["sequences"] == 256
    assert "one process" in doc.read_text()
    assert "1,000 tokens/s" in capsys.readouterr().out
