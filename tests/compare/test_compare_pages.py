"""The table of a comparison, from runs that are made up."""

import json

import pytest
from comparisons import DESCRIPTION, comparison, describe, make_up
from rich.console import Console

from copd_megatron.compare.command import compare
from copd_megatron.compare.plots import absorption, draw_drift, draw_rows
from copd_megatron.compare.results import gather
from copd_megatron.errors import ConfigError, CopdError
from copd_megatron.observe.record import read_run

SHARES = {"experts": 0.5, "mopd": 0.55, "copd": 0.7, "slow": 0.65}


@pytest.fixture
def given(tmp_path):
    """Two seeds of everything but one seed of MOPD; the arm `slow` was never run."""
    found = comparison(tmp_path)
    for name, updates in (("experts", 10), ("mopd", 10), ("copd", 15)):
        for seed in (0, 1):
            if (name, seed) != ("mopd", 1):
                make_up(found, name, seed, SHARES[name], updates)
    return found


def test_rows_say_what_they_are_what_they_cost_and_why_they_are_missing(given):
    rows = {row.label: row for row in gather(given, {("slow", 0): "out of memory"})}
    assert list(rows) == ["base", "text expert", "merge without OPD", "MOPD", "CoPD", "CoPD 2 : 1"]
    assert rows["base"].cost is None
    assert rows["text expert"].cost["updates"] == 10
    assert rows["merge without OPD"].cost["updates"] == 20
    assert (rows["MOPD"].cost["updates"], rows["MOPD"].cost["depth"]) == (30, 20)
    assert (rows["CoPD"].cost["updates"], rows["CoPD"].cost["depth"]) == (30, 15)
    assert rows["MOPD"].accuracy.seeds == (0,)
    assert rows["MOPD"].missing == {1: "not begun"}
    assert rows["CoPD 2 : 1"].accuracy is None
    assert rows["CoPD 2 : 1"].missing == {0: "out of memory", 1: "not begun"}
    assert rows["base"].accuracy.versus["CoPD"]["overall"].mean < -0.15
    assert all(row.budget is None for row in rows.values())


def test_drift_is_drawn_where_every_seed_was_measured(given):
    runs = [given.run_dir("copd", seed) for seed in (0, 1)]
    for name in ("text", "image"):
        file = runs[1] / "branches" / name / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if '"probe", "step": 5,' not in line))
    figure = draw_drift([("copd", [read_run(run) for run in runs])])
    for axis in figure.axes:
        assert [list(line.get_xdata()) for line in axis.lines] == [[0, 10, 15]]


def test_pages_have_every_row_and_every_plot(given, tmp_path):
    make_up(given, "slow", 0, SHARES["slow"], 15)
    compare(describe(tmp_path), [], Console(quiet=True), train=False)
    out = tmp_path / "out"
    page, html = (out / "compare.md").read_text(), (out / "compare.html").read_text()
    for text in ("MOPD", "CoPD 2 : 1", "seed 1 not run: not begun", "SYNTHETIC convention", "fewer than three seeds"):
        assert text in page
        assert text in html
    assert sorted(path.stem for path in (out / "plots").iterdir()) == [
        "absorption",
        "accuracy",
        "drift",
        "forgetting",
        "sweep",
    ]
    content = json.loads((out / "compare.json").read_text())
    row = next(row for row in content["rows"] if row["label"] == "MOPD")
    assert row["missing"] == {"1": "not begun"}
    assert 0 < row["accuracy"]["versus"]["CoPD"]["overall"]["p"] <= 1


def test_several_references_have_a_column_each(given, tmp_path):
    compare(describe(tmp_path, reference=["CoPD", "MOPD"]), [], Console(quiet=True), train=False)
    lines = (tmp_path / "out" / "compare.md").read_text().splitlines()
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert header[4:8] == ["overall − CoPD", "p", "overall − MOPD", "p"]
    cells = {row[0]: row[4:8] for row in rows[1:] if len(row) == len(header)}
    assert cells["CoPD"][:2] == ["–", "–"]
    assert cells["CoPD"][2].startswith("+")
    assert cells["MOPD"][0].startswith("-")
    assert cells["MOPD"][2:] == ["–", "–"]
    assert cells["CoPD 2 : 1"] == ["–"] * 4


def test_budgets_and_the_line_are_those_of_the_first_reference(given, tmp_path):
    make_up(given, "slow", 0, SHARES["slow"], 12)
    for references, differ in (
        (["CoPD", "CoPD 2 : 1"], {"CoPD 2 : 1"}),
        (["CoPD 2 : 1", "CoPD"], {"MOPD", "CoPD"}),
    ):
        rows = gather(comparison(tmp_path, reference=references), {})
        assert {row.label for row in rows if row.budget} == differ
        first = next(row.accuracy.of["overall"].mean for row in rows if row.label == references[0])
        dotted = [line for line in draw_rows(rows, references).axes[-1].lines if line.is_dashed()]
        assert [line.get_xdata()[0] for line in dotted] == [pytest.approx(100 * first)]


def test_benchmarks_are_a_second_table(given, tmp_path):
    for file in (tmp_path / "out/runs").glob("*/outcomes.json"):
        content = json.loads(file.read_text())
        for capabilities in content.values():
            text = capabilities.pop("text")
            capabilities |= {"text/easy": [[1.0, 1]] * 20, "text/hard": text}
        file.write_text(json.dumps(content))
    compare(describe(tmp_path), [], Console(quiet=True), train=False)
    page = (tmp_path / "out/compare.md").read_text()
    header, _, easy, hard = page.partition("## Accuracy by benchmark\n\n")[2].splitlines()[:4]
    assert header == "| benchmark | base | text expert | merge without OPD | MOPD | CoPD |"
    assert easy.startswith("| text/easy | 100.0 [100.0, 100.0] |")
    assert hard.startswith("| text/hard | ")
    assert "Accuracy by benchmark" in (tmp_path / "out/compare.html").read_text()
    row = next(row for row in gather(given, {}) if row.label == "CoPD").accuracy
    assert list(row.of) == ["image", "text", "overall"]
    parts = [row.benchmarks["text/easy"].mean, row.benchmarks["text/hard"].mean]
    assert row.of["text"].mean == pytest.approx(sum(parts) / 2)
    assert row.of["overall"].mean == pytest.approx((sum(parts) + row.of["image"].mean) / 3)


def test_absorption_is_read_from_the_probes_at_both_ends_of_phase_two(given):
    record = read_run(given.run_dir("copd", 0))
    assert absorption(record) == [(pytest.approx(0.8), pytest.approx(10.0))] * 2, "5 updates, +0.05, from step 10"
    assert absorption(read_run(given.run_dir("experts", 0))) == []


def test_row_that_was_never_run_says_so(given, tmp_path):
    compare(describe(tmp_path), [], Console(quiet=True), train=False)
    line = next(line for line in (tmp_path / "out/compare.md").read_text().splitlines() if "CoPD 2 : 1" in line)
    assert "not run" in line
    assert "±" not in line


def test_unequal_budget_is_an_error_after_the_table_is_written(given, tmp_path):
    make_up(given, "slow", 0, SHARES["slow"], 16)
    with pytest.raises(CopdError, match=r"CoPD 2 : 1 \(slow\): updates \+6\.7%, rollout tokens \+6\.7%"):
        compare(describe(tmp_path), [], Console(quiet=True), train=False)
    assert "Not at equal budget" in (tmp_path / "out/compare.md").read_text()
    compare(describe(tmp_path, tolerance=0.07), [], Console(quiet=True), train=False)


def test_nothing_to_compare_is_said(tmp_path):
    with pytest.raises(CopdError, match="no run of this comparison has a result"):
        compare(describe(tmp_path), [], Console(quiet=True), train=False)


def test_row_of_a_model_that_does_not_exist_is_named(tmp_path):
    arms = [{"name": "copd", "rows": [{"label": "CoPD", "model": "merged"}, {"label": "x", "model": "texts branch"}]}]
    found = comparison(tmp_path, arms=arms)
    make_up(found, "copd", 0, 0.7, 5)
    with pytest.raises(CopdError, match="'x' is to be 'texts branch', but it has base, text branch"):
        gather(found, {})


def test_run_with_other_settings_is_not_taken_for_the_one_described(given, tmp_path):
    common = {**DESCRIPTION["common"], "rl": {"group": 4}}
    with pytest.raises(ConfigError, match=r"experts_seed0 was run with other settings .*rl\.group: 8 -> 4"):
        compare(describe(tmp_path, common=common), [], Console(quiet=True), train=False)
