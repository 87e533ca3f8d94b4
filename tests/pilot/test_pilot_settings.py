"""The description of a pilot study."""

from pathlib import Path

import pytest
from pilots import DESCRIPTION, describe, study

from copd_megatron.config import load_config
from copd_megatron.errors import ConfigError
from copd_megatron.pilot.settings import PilotSettings

COMMON = DESCRIPTION["common"]


def test_runs_follow_from_the_study(tmp_path):
    given = study(tmp_path)
    teacher, student, taught = given.rlvr(1, "text"), given.rlvr(1, "image"), given.distillation(1, 10)
    assert (teacher.method, teacher.student, teacher.seed, teacher.base) == ("expert", "text", 1, "bases/seed_1")
    assert (teacher.rhythm.cycles, teacher.rhythm.explore_steps, teacher.rhythm.exchange_steps) == (1, 20, 0)
    assert (student.rhythm.explore_steps, student.checkpoint.at_steps) == (40, (10, 20, 40))
    assert teacher.checkpoint.at_steps == (10, 20), "the teacher is looked at where students are"
    assert student.checkpoint.keep == 1
    assert (taught.method, taught.edges) == ("static_opd", (("image", "text"),))
    assert (taught.rhythm.exchange_steps, taught.rhythm.explore_steps) == (5, 0)
    assert taught.experts == {
        "image": f"{student.run_dir}/models/step_0000010",
        "text": f"{teacher.run_dir}/branches/text/final",
    }
    assert given.distillation(1, 0).experts["image"] == "bases/seed_1"
    assert given.distillation(1, 40).experts["image"] == f"{student.run_dir}/branches/image/final"
    assert [given.measured(name) for name in ("text", "image")] == [[0, 10, 20], [0, 10, 20, 40]]
    folders = {given.distillation(seed, updates).run_dir for seed in (0, 1) for updates in given.student.updates}
    assert len(folders) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"capability": "image", "updates": [10, 0]}}, r"student.updates = \[10, 0\]: .* ascending"),
        ({"student": {"capability": "image", "updates": [10, 10]}}, "expected different numbers"),
        ({"student": {"capability": "image", "updates": [-1, 10]}}, "from 0 up"),
        ({"student": {"capability": "image", "updates": [0]}}, "at least one student must have been trained"),
        ({"student": {"capability": "text", "updates": [10]}}, "is the teacher's own"),
        ({"student": {"capability": "video", "updates": [10]}}, r"student.capability = 'video' is none of .*text"),
        ({"teacher": {"capability": "video", "updates": 5}}, "teacher.capability = 'video' is none of"),
        ({"common": {**COMMON, "method": "copd"}}, "common.method: the study decides it"),
        ({"common": {**COMMON, "rhythm": {}, "seed": 1}}, "common.seed: the study decides it; leave out seed, rhythm"),
        ({"common": {**COMMON, "rl": {"group": 1}}}, r"common: .*\n.*rl\.group"),
        ({"common": {**COMMON, "log": {}}}, r"common.log.overlap_k = 10 is none of overlaps = \[1, 5\]"),
        ({"common": {**COMMON, "opd": {"top_k": 8}}, "overlaps": [5, 9]}, "common.opd.top_k = 8: .* at least 9"),
        ({"common": {**COMMON, "eval": {"models": ["merged"]}}}, "common.eval.models = .*need branches"),
        ({"overlaps": [0, 5]}, "overlaps"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"budgets": 3}, "did you mean 'budget'"),
    ],
)
def test_mistakes_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        study(tmp_path, **changes)


def test_mistakes_name_the_file(tmp_path):
    file = describe(tmp_path, budget=0)
    with pytest.raises(ConfigError, match=rf"{file}: .*\n  budget: "):
        load_config(file, [], PilotSettings)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs/pilot").glob("*.yaml")), ids=str)
def test_shipped_study_has_valid_runs(file):
    given = load_config(file, [], PilotSettings)
    for seed in given.seeds:
        assert given.rlvr(seed, given.teacher.capability).rhythm.open().total == given.teacher.updates
        for updates in given.student.updates:
            assert given.distillation(seed, updates).rhythm.open().total == given.budget
