"""The description of a comparison."""

from pathlib import Path

import pytest
import yaml
from comparisons import DESCRIPTION, comparison

from copd_megatron.compare.settings import Comparison
from copd_megatron.config import load_config
from copd_megatron.errors import ConfigError


def arm(given, name):
    return next(one for one in given.arms if one.name == name)


def test_run_of_an_arm_is_the_common_description_with_its_changes(tmp_path):
    given = comparison(tmp_path)
    experts, mopd, copd = (given.run(arm(given, name), 1) for name in ("experts", "mopd", "copd"))
    assert (copd.method, copd.seed, copd.base) == ("copd", 1, "bases/seed_1")
    assert (copd.rhythm.cycles, copd.rhythm.explore_steps) == (1, 15)
    assert (experts.rhythm.cycles, experts.rhythm.explore_steps) == (1, 10)
    assert copd.run_dir == str(tmp_path / "out" / "runs" / "copd_seed1")
    assert mopd.experts["text"] == f"{experts.run_dir}/branches/text/final"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "GRPO"}, "reference = 'GRPO' is none of the rows base, text expert"),
        ({"arms": [*DESCRIPTION["arms"], DESCRIPTION["arms"][0]]}, "arms: names must differ"),
        ({"arms": list(reversed(DESCRIPTION["arms"]))}, "experts = 'experts' is no arm before it"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"reference": ["CoPD", "GRPO"]}, "reference = 'GRPO' is none of the rows"),
        ({"reference": ["CoPD", "CoPD"]}, "reference must differ"),
        ({"reference": []}, "reference"),
        ({"arms": [{**DESCRIPTION["arms"][2], "rows": [{"lable": "CoPD"}]}]}, "did you mean 'label'"),
    ],
)
def test_mistakes_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        comparison(tmp_path, **changes)


def test_arm_that_is_no_valid_run_is_named(tmp_path):
    given = comparison(tmp_path, common={**DESCRIPTION["common"], "rl": {"group": 1}})
    with pytest.raises(ConfigError, match=r"arm copd, seed 0: .*\n.*rl\.group"):
        given.run(arm(given, "copd"), 0)


def test_comparison_takes_a_run_description_and_some_of_its_branches(tmp_path):
    description = {
        "base": "models/base",
        "branches": [{"name": name, "data": {"mini": {"modality": name}}} for name in ("text", "image", "video")],
        "topology": {"hub": "text"},
        "rl": {"prompts": 64, "group": 4},
        "log": {"overlap_k": 5},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    changes = {"from_run": str(tmp_path / "run.yaml"), "common": {"topology": "pair", "rl": {"group": 2}}}
    given = comparison(tmp_path, with_branches=["image", "text"], **changes)
    run = given.run(arm(given, "copd"), 1)
    assert [branch.name for branch in run.branches] == ["image", "text"]
    assert (run.rl.prompts, run.rl.group, run.topology, run.seed) == (64, 2, "pair", 1)
    unknown = comparison(tmp_path, with_branches=["text", "audio"], **changes)
    with pytest.raises(ConfigError, match="with_branches: audio is none of text, image, video"):
        unknown.run(arm(unknown, "copd"), 0)
    absent = comparison(tmp_path, from_run="absent.yaml")
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such config file"):
        absent.run(arm(absent, "copd"), 0)


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[2] / "configs/compare").glob("*.yaml")), ids=str)
def test_shipped_comparison_has_valid_runs_of_the_budgets_it_claims(file, monkeypatch):
    monkeypatch.chdir(file.parents[2])
    given = load_config(file, [], Comparison)
    updates = {}
    for one in given.arms:
        runs = [given.run(one, seed) for seed in given.seeds]
        updates[one.name] = len(runs[0].trained) * runs[0].rhythm.open().total + updates.get(one.experts, 0)
        # None is a constant learning rate, the paper's.
        assert runs[0].optimizer.decay_steps in (None, runs[0].rhythm.open().total), one.name
    equal = {updates[one.name] for one in given.arms for row in one.rows if row.equal_budget and row.model != "base"}
    assert len(equal) == 1, updates
