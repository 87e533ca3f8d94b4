"""Handing weights over: real gangs, nothing unequal is timed, and memory that follows the model is an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import bench_export
import doc_table
import pytest
from bench_export import Case, check_memory, run, summary, table
from bench_model import Shape, write_model

SHAPE = Shape(hidden=32, layers=2, heads=4, groups=2, head_dim=16, mlp=48, vocabulary=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export")
    write_model(path, SHAPE)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [degrees for _, degrees in bench_export.LAYOUTS])
def test_every_layout_hands_over_the_whole_model(folder: Path, degrees: dict[str, int]) -> None:
    row = run(Case(str(folder), 2, "bf16", degrees), timeout=200)
    half = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2  # the folder is float32
    assert row["bytes"] == pytest.approx(half, rel=0.3)
    assert row["bytes"] < half  # which has a header too
    assert row["largest"] == 2 * 2 * SHAPE.mlp * SHAPE.hidden or row["largest"] == 2 * SHAPE.vocabulary * SHAPE.hidden
    assert len(row["seconds"]) == 2
    assert len(row["grown_mib"]) == degrees.get("world", 1)


def test_weights_that_are_not_the_folders_stop_the_benchmark(folder: Path) -> None:
    from copd_megatron.weights.hf import HfFolder

    class Policy:
        changed = "lm_head.weight"

        def named_weights(self) -> Any:
            for name, tensor in HfFolder(folder).tensors():
                yield name, tensor + (name == self.changed)

    with pytest.raises(SystemExit, match="is not what"):
        bench_export.check(Policy(), str(folder))
    Policy.changed = ""
    expected = sum(tensor.nbytes for _, tensor in HfFolder(folder).tensors())
    assert bench_export.check(Policy(), str(folder)) == expected


def test_a_rank_that_fails_is_named_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"one process, rank 0 \(1\): .*config\.json"):
        run(Case(str(tmp_path), 1), timeout=100)


def rank(**more: Any) -> dict[str, Any]:
    return {"seconds": [0.2, 0.1, 0.3], "bytes": 0, "largest": 0, "grown_mib": 1.0, **more}


def test_slowest_rank_and_largest_memory_count() -> None:
    leader = rank(seconds=[0.1, 0.4, 0.3], bytes=2**30, largest=2**20, grown_mib=5.0)
    row = summary([leader, rank()])
    assert row["seconds"] == [0.2, 0.4, 0.3]
    assert row["bytes_per_second"] == pytest.approx(2**30 / 0.3)
    assert row["grown_mib"] == [5.0, 1.0]


def test_memory_that_follows_the_model_is_an_error() -> None:
    def rows(grown: float) -> list[dict[str, Any]]:
        return [
            {"name": "tp", **summary([rank(bytes=100 * 2**20, grown_mib=150.0)])},
            {"name": "tp", **summary([rank(bytes=300 * 2**20, grown_mib=grown)])},
        ]

    check_memory(rows(160.0))
    with pytest.raises(SystemExit, match=r"tp: a rank takes 0\.50 bytes more for each byte"):
        check_memory(rows(250.0))


def test_table_takes_its_place_in_the_document(tmp_path: Path) -> None:
    row = {"name": "one process", **summary([rank(bytes=512 * 2**20, largest=16 * 2**20)])}
    facts = {"date": "2000-01-01", "machine": "m", "torch": "2", "precision": "bf16", "repeats": 3, "layouts": [row]}
    text = table(json.loads(json.dumps(facts)))
    assert "| one process | 512 | 2.68 | 0.20 | 1 |" in text
    doc = tmp_path / "doc.md"
    doc.write_text("before\n<!-- export: begin -->\nold\n<!-- export: end -->\nafter\n")
    doc_table.put(doc, "export", text)
    assert doc.read_text() == f"before\n<!-- export: begin -->\n{text}<!-- export: end -->\nafter\n"
    with pytest.raises(SystemExit, match="once each"):
        doc_table.put(doc, "merge", text)


@pytest.mark.parametrize("name", ["export", "merge"])
def test_the_document_has_the_places(name: str) -> None:
    text = (Path(bench_export.__file__).parents[1] / "docs" / "performance.md").read_text()
    assert (text.count(f"<!-- {name}: begin -->"), text.count(f"<!-- {name}: end -->")) == (1, 1)


def test_models_are_measured_from_small_to_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, dict[str, int]]] = []

    def measured(case: Case, timeout: float) -> dict[str, Any]:
        size = sum(file.stat().st_size for file in Path(case.folder).glob("*.safetensors"))
        asked.append((case.precision, case.layout))
        return summary([rank(bytes=size, largest=1)])

    monkeypatch.setattr(bench_export, "run", measured)
    arguments = ["--hidden", "16", "--layers", "2", "4", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["bench_export.py", *arguments])
    bench_export.main()
    assert asked == 2 * [("bf16", degrees) for _, degrees in bench_export.LAYOUTS]
    sizes = [row["bytes"] for row in json.loads((tmp_path / "out.json").read_text())["layouts"]]
    assert sizes[0] == sizes[2] < sizes[3] == sizes[5]
    assert "| pipeline parallel, pp = 2 |" in capsys.readouterr().out
