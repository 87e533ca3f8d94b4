"""The report, of finished, partial, hostile and damaged runs."""

from __future__ import annotations

import json
import re
import shutil
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
from simulated_run import write_evaluation, write_run

from copd_megatron.errors import CopdError
from copd_megatron.observe.events import EventLog
from copd_megatron.observe.metrics import MetricsWriter, metrics_path
from copd_megatron.observe.plots import FIGURES, draw_curves, moving_average
from copd_megatron.observe.plots_results import time_split, timeline_steps
from copd_megatron.observe.record import Period, read_run
from copd_megatron.observe.report import build_report, distinct_names
from copd_megatron.observe.report_tables import counter_table, drift_table, failure_table, switch_table

PLOTS = {"accuracy", "reward", "drift", "support", "heldout", "health", "distillation", "speed", "time", "timeline"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    write_run(run, cycles=2)
    write_evaluation(run)
    build_report(run)
    return run


def page_of(path: Path) -> str:
    """The page without its pictures."""
    return re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "PNG", path.read_text())


def test_finished_run_shows_everything(finished: Path) -> None:
    page = page_of(finished / "report.html")
    assert {path.stem for path in (finished / "plots").iterdir()} == PLOTS
    assert page.count('src="PNG"') == len(PLOTS)
    assert "50 of 50 updates per branch, complete" in page
    assert "64.0 [61.1, 66.9]" in page
    assert "One convention is synthetic." in page
    assert "overlap_k: 5" in page
    assert "copd-megatron" in page
    assert 'class="missing"' not in page


def test_page_needs_no_other_file(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!#|data:image/png;base64,)', page) == []
    assert "http" not in page_of(finished / "report.html")
    for picture in re.findall(r"base64,([^\"]+)", page):
        assert b64decode(picture).startswith(b"\x89PNG\r\n")


def test_report_merges_the_branches_metrics(finished: Path) -> None:
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2 * (50 + 10)


def test_phases_and_drift_are_read_from_the_lines(finished: Path) -> None:
    record = read_run(finished)
    assert record.periods() == [
        Period(0, "explore", 0, 15),
        Period(0, "exchange", 15, 25),
        Period(1, "explore", 25, 40),
        Period(1, "exchange", 40, 50),
    ]
    assert record.edges("overlap") == [("text", "image"), ("image", "text")]
    table = drift_table(record)
    assert table is not None
    assert len(table.rows) == 4
    for row in table.rows:
        overlap_apart, overlap_closer, kl_apart, kl_closer = map(float, row[2:])
        assert overlap_closer > overlap_apart > 0.5
        assert kl_closer < kl_apart


def test_drift_is_drawn_from_probes_only(finished: Path) -> None:
    figure = draw_curves(read_run(finished), FIGURES[1])
    assert figure is not None
    overlap = figure.axes[0]
    curves = {str(line.get_label()): np.asarray(line.get_xydata()) for line in overlap.get_lines()}
    assert [name for name in curves if "←" in name] == ["text ← image", "image ← text"]
    assert curves["text ← image"].shape == (10, 2)
    assert curves["text ← image"][:, 1].min() > 0.5
    assert overlap.get_ylabel().startswith("overlap@5")


def test_phase_that_is_not_over_has_no_end_in_the_drift_table(tmp_path: Path) -> None:
    write_run(tmp_path / "run", cycles=2, stop_at=30)
    table = drift_table(read_run(tmp_path / "run"))
    assert table is not None
    assert {row[1] for row in table.rows} == {"1"}


def test_ends_of_steered_phases_are_listed_with_their_reasons(tmp_path: Path) -> None:
    run = tmp_path / "steered"
    write_run(run, cycles=2, stop_at=30)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("rhythm: {", "rhythm: {kind: overlap, "))
    for branch in ("text", "image"):
        writer = MetricsWriter(metrics_path(run, branch), branch)
        reasons = [(15, "explore", "it fell"), (25, "exchange", "it rose")]
        for step, phase, reason in reasons:
            writer.write(step, 0, "switch", ended=phase, reason=reason, length=step % 20, low=0.8, high=0.9)
        writer.close()
    record = read_run(run)
    assert [row[:5] + row[-1:] for row in switch_table(record).rows] == [
        ("Phase I", "1", "15", "15", "0.800 to 0.900", "it fell"),
        ("Phase II", "1", "25", "5", "0.800 to 0.900", "it rose"),
    ]
    assert [period.end for period in record.finished_periods()] == [15, 25], "the one that goes on is not over"
    page = page_of(build_report(run))
    assert "Ends of phases" in page
    assert "it rose" in page


def test_failures_are_listed_with_what_was_done_about_them(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tell = EventLog(run)
    tell("CoPD", "start", "training from step 0")
    tell("text", "failure", "died without a word, exit status 1\nand more")
    tell("CoPD", "recovery", "all branches go on from step 5")
    with open(run / "events.jsonl", "a") as file:
        file.write('{"time": "cut off')
    assert [row[1:] for row in failure_table(read_run(run)).rows] == [
        ("text", "failure", "died without a word, exit status 1"),
        ("CoPD", "recovery", "all branches go on from step 5"),
    ]
    assert "all branches go on from step 5" in page_of(build_report(run))
    assert "Failures and recoveries" not in page_of(finished / "report.html")


def test_counters_add_up_and_uncounted_is_not_zero(finished: Path) -> None:
    table = counter_table(read_run(finished))
    assert table is not None
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["groups of rollouts"] == ("1,600", "1,600")
    assert rows["updates skipped (loss or gradient not finite)"] == ("1", "1")
    assert rows["prompts refused (too long)"] == ("–", "–")


def test_time_split_and_the_steps_in_detail(finished: Path) -> None:
    record = read_run(finished)
    assert time_split(record, "text", "explore")["score"] == 0
    assert 0.04 < time_split(record, "text", "exchange")["score"] < 0.08
    assert timeline_steps(record) in ([14, 15, 16, 17], [39, 40, 41, 42])


def test_run_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    run = tmp_path / "begun"
    write_run(run, stop_at=3)
    (run / "environment.json").unlink()
    page = page_of(build_report(run))
    assert "3 of 100 updates per branch, unfinished" in page
    assert "not evaluated yet: no evaluation.json" in page
    assert "not recorded: overlap, symkl" in page
    assert "not recorded: environment.json" in page
    assert {path.stem for path in (run / "plots").iterdir()} == PLOTS - {"accuracy", "drift", "support", "heldout"}
    assert "Phase II (exchange)" not in page


def test_run_without_any_metrics_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("base: models/mini\n")
    page = page_of(build_report(tmp_path))
    assert "no metrics yet" in page
    assert "src=" not in page
    assert not (tmp_path / "plots").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    run = tmp_path / "run"
    names = ("<script>alert(1)<", r"_$\frac{$ & 'x' \"y\"")
    write_run(run, names, cycles=1)
    write_evaluation(run, models=("<img src=x onerror=alert(2)>", "$x^"))
    page = page_of(build_report(run))
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;" in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page
    assert len(list((run / "plots").iterdir())) == len(PLOTS)


def test_names_with_underscore_or_dollars_reach_the_legend(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, ("_text", "im$a$ge"), cycles=1)
    figure = draw_curves(read_run(run), FIGURES[0])
    assert figure is not None
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["\N{NO-BREAK SPACE}_text", r"im\$a\$ge", "Phase II (exchange)"]


def test_several_runs_are_laid_side_by_side(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_run(other, ("text", "image", "video"), cycles=2, stop_at=5)
    target = build_report([other, finished])
    page = page_of(target)
    assert target == tmp_path / "comparison.html"
    assert {path.stem for path in (tmp_path / "comparison_plots").iterdir()} == {"accuracy", "reward"}
    assert "other: 5 of 50 updates per branch, unfinished" in page
    assert "finished: merged" in page
    assert "branches.2.name" in page
    assert not (other / "report.html").exists()


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("a/seed0", "b/seed0"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.yaml").write_text("base: models/mini\n")
    records = [read_run(tmp_path / folder) for folder in ("a/seed0", "b/seed0")]
    assert distinct_names(records) == ["a/seed0", "b/seed0"]


def test_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CopdError, match="expected a run folder, found none"):
        build_report(tmp_path / "missing")
    with pytest.raises(CopdError, match=r"expected config\.yaml or metrics, found neither"):
        build_report(tmp_path)


@pytest.mark.parametrize(
    ("score", "complaint"),
    [
        ({"accuracy": 64.0, "low": 61.0, "high": 67.0}, r"models\.0\.capabilities\.text\.accuracy"),
        ({"accuracy": 0.5, "low": 0.6, "high": 0.7}, "expected low ≤ accuracy ≤ high"),
    ],
)
def test_wrong_evaluation_names_its_field(tmp_path: Path, score: dict[str, float], complaint: str) -> None:
    (tmp_path / "config.yaml").write_text("base: models/mini\n")
    table = {"task": "mini", "n": 8, "seed": 0, "models": [{"name": "base", "capabilities": {"text": score}}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(table))
    with pytest.raises(CopdError, match=complaint):
        build_report(tmp_path)


def test_moving_average_skips_what_is_not_finite() -> None:
    assert moving_average([1.0, float("nan"), 3.0, 5.0], 3) == [1.0, 2.0, 4.0, 4.0]
