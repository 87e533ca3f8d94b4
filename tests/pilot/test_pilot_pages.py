"""The pages of a pilot study, from runs and measurements that are made up."""

import json

import pytest
from pilots import DESCRIPTION, describe, finish_experts, make_up, measure, study
from rich.console import Console

from copd_megatron.errors import ConfigError, CopdError
from copd_megatron.pilot.command import pilot
from copd_megatron.pilot.pages import notes_of, relations_table, students_table
from copd_megatron.pilot.results import as_plain, gather, predictors

QUIET = Console(quiet=True)


def test_pages_have_every_student_predictor_and_plot(tmp_path):
    given = study(tmp_path)
    make_up(given, 0)
    pilot(describe(tmp_path), [], QUIET, train=False)
    out = tmp_path / "out"
    page, html, content = (out / "pilot.md").read_text(), (out / "pilot.html").read_text(), json.loads(
        (out / "pilot.json").read_text())  # fmt: skip
    assert sorted(path.stem for path in (out / "plots").iterdir()) == ["correlations", "gain", "rivals", "rlvr"]
    for name in (
        "overlap@1",
        "overlap@5",
        "symmetric KL",
        "low support",
        "KL(teacher ‖ student)",
        "One seed",
        "SYNTHETIC",
    ):
        assert name in page
        assert name in html
    assert [student["absorbed"]["mean"] for student in content["students"]] == pytest.approx([0.9, 0.6, 0.5, 0.1])
    assert content["main"] == "overlap@5"
    assert set(content["relations"]) == set(predictors(given))
    assert content["relations"]["overlap@5"]["line"]["r"] > 0.9
    assert content["relations"]["kl_teacher"]["line"]["r"] < -0.9
    assert {(line["capability"], line["updates"]) for line in content["rlvr"]} == {
        *(("text", updates) for updates in (0, 10, 20)),
        *(("image", updates) for updates in (0, 10, 20, 40)),
    }


def test_student_without_a_gain_says_why_and_the_study_is_not_whole(tmp_path):
    given = study(tmp_path)
    make_up(given, 0, without=(20,))
    result = gather(given, {(0, 20): "out of memory"})
    rows = {row[0]: row for row in students_table(given, result).rows}
    assert rows["20"][-1] == "not run: out of memory"
    assert rows["20"][3] == "–"
    assert rows["10"][-1].startswith("0.60 [")
    assert result.analysis.relations["symkl"].line.n == 3
    plain = as_plain(given, result)["students"][2]
    assert (plain["missing"], plain["absorbed"]) == ("out of memory", None)
    assert plain["predictors"]["symkl"]["mean"] == pytest.approx(0.4, abs=0.1)
    with pytest.raises(CopdError, match=r"not whole:\n  seed 0, 20 updates: not run"):
        pilot(describe(tmp_path), [], QUIET, train=False)
    assert "| 20 | 0 |" in (tmp_path / "out/pilot.md").read_text()


def test_teacher_that_is_not_ahead_gives_no_share(tmp_path):
    given = study(tmp_path, least_advantage=0.5)
    make_up(given, 0)
    result = gather(given, {})
    assert all("teacher not ahead by 50%" in row[-1] for row in students_table(given, result).rows)
    assert all(row[1] == "not defined" for row in relations_table(result, predictors(given)).rows)
    pilot(describe(tmp_path, least_advantage=0.5), [], QUIET, train=False)
    assert not (tmp_path / "out/plots/gain.png").exists()


def test_predictors_are_listed_by_strength(tmp_path):
    given = study(tmp_path)
    make_up(given, 0)
    strengths = [abs(float(row[1])) for row in relations_table(gather(given, {}), predictors(given)).rows]
    assert strengths == sorted(strengths, reverse=True)


def test_notes_say_what_few_students_and_one_seed_mean(tmp_path):
    given = study(tmp_path, seeds=[0, 1])
    make_up(given, 0)
    make_up(given, 1)
    both = gather(given, {})
    assert both.analysis.relations["symkl"].line.n == 8
    assert any("8 students" in note for note in notes_of(both, predictors(given)))
    assert not any("One seed" in note for note in notes_of(both, predictors(given)))


def test_correlation_that_rests_on_one_student_is_noted(tmp_path):
    given = study(tmp_path)
    make_up(given, 0)
    assert not any("Without one" in note for note in notes_of(gather(given, {}), predictors(given)))
    for updates, far in ((0, 0.01), (10, 0.31), (20, 0.32), (40, 0.30)):
        file = given.measurement(0, "image", updates)
        content = json.loads(file.read_text())
        content["from_teacher"]["kl"] = [[far, 1.0]] * given.problems
        file.write_text(json.dumps(content))
    notes = notes_of(gather(given, {}), predictors(given))
    assert [note for note in notes if "Without one" in note] == [
        "Without one of the students, r is less than half as large, or turns: KL(teacher ‖ student)."
    ]


def test_measured_students_are_shown_before_they_are_distilled(tmp_path):
    given = study(tmp_path)
    finish_experts(given, 0)
    measure(given, 0, "image", 10)
    result = gather(given, {})
    assert result.analysis.gains == {(0, 10): None}
    assert set(result.missing) == {(0, updates) for updates in given.student.updates}


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(CopdError, match=r"out: no student has been measured \(nothing was run\); .*out/runs"):
        pilot(describe(tmp_path), [], QUIET, train=False)
    with pytest.raises(CopdError, match=r"\(no expert text: no space; no expert image: no luck\)"):
        gather(study(tmp_path), {(0, 0): "no expert text: no space", (0, 10): "no expert image: no luck"})


def test_damaged_measurement_is_named(tmp_path):
    given = study(tmp_path)
    make_up(given, 0)
    file = given.measurement(0, "image", 10)
    file.write_text(file.read_text().replace('"symkl":[[', '"symkl":[["x"],[', 1))
    with pytest.raises(CopdError, match=r"image_10_seed0.json: from_base.symkl.0.* Remove the file"):
        gather(given, {})


def test_run_with_other_settings_is_not_taken_for_the_one_described(tmp_path):
    make_up(study(tmp_path), 0)
    common = {**DESCRIPTION["common"], "rl": {"group": 4}}
    with pytest.raises(ConfigError, match=r"rlvr_text_seed0 was run with other settings .*rl\.group: 8 -> 4"):
        pilot(describe(tmp_path, common=common), [], QUIET, train=False)
