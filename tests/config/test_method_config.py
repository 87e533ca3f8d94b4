"""What each method trains, from where and by whose teaching."""

import pytest
import yaml

from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import ConfigError

BRANCHES = [{"name": name, "data": {"mini": {"modality": "text"}}} for name in ("text", "image", "video")]
EXPERTS = {name: f"experts/{name}" for name in ("text", "image", "video")}
DISTIL = {"rhythm": {"cycles": 1, "explore_steps": 0, "exchange_steps": 5}, "experts": EXPERTS}


def load(tmp_path, **content):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"base": "base", "branches": BRANCHES, "topology": "hub", **content}))
    return load_config(file, [], RunConfig)


def names(config):
    return [branch.name for branch in config.trained]


def test_copd_and_merge_only_train_every_branch(tmp_path):
    copd, merge_only = load(tmp_path), load(tmp_path, method="merge_only")
    assert names(copd) == names(merge_only) == ["text", "image", "video"]
    assert len(copd.edges) == 4
    assert merge_only.edges == ()
    assert copd.frozen == merge_only.frozen == {}


def test_expert_is_one_branch_alone(tmp_path):
    config = load(tmp_path, method="expert", student="image")
    assert names(config) == ["image"]
    assert config.edges == ()


def test_mixed_is_one_branch_on_all_data(tmp_path):
    config = load(tmp_path, method="mixed")
    assert names(config) == ["mixed"]
    assert len(config.branch("mixed").data.mixture) == 3
    assert config.edges == ()


def test_static_opd_is_an_expert_with_the_frozen_teachers_that_the_topology_gives_it(tmp_path):
    config = load(tmp_path, method="static_opd", student="image", **DISTIL)
    assert names(config) == ["image"]
    assert config.edges == (("image", "text"),)
    assert config.frozen == {"text": "experts/text"}
    assert config.start("image") == "experts/image"
    assert config.native_prompts == 0
    hub = load(tmp_path, method="static_opd", student="text", opd={"native_prompts": 8}, **DISTIL)
    assert hub.edges == (("text", "image"), ("text", "video"))
    assert hub.native_prompts == 8


def test_mopd_starts_from_the_base_and_is_taught_by_all(tmp_path):
    config = load(tmp_path, method="mopd", **DISTIL)
    assert names(config) == ["mopd"]
    assert config.edges == (("mopd", "text"), ("mopd", "image"), ("mopd", "video"))
    assert config.frozen == EXPERTS
    assert config.start("mopd") == "base"
    assert config.native_prompts == 0


def test_two_models_merge_need_not_fit_a_method_without_merge(tmp_path):
    load(tmp_path, method="mixed", merge={"method": "slerp"})
    with pytest.raises(ConfigError, match="slerp merges two models, 3 are given"):
        load(tmp_path, merge={"method": "slerp"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "expert"}, "student = None: method expert expects one of text, image, video"),
        ({"method": "expert", "student": "sound"}, "student = 'sound'"),
        ({"student": "text"}, "method copd expects none"),
        ({"experts": EXPERTS}, "experts: image, text, video is of no use to method copd"),
        ({"method": "mopd", **DISTIL, "experts": {"text": "a"}}, "no folder for image, video"),
        ({"method": "static_opd", "student": "text", **DISTIL, "experts": {"text": "a"}}, "no folder for image, video"),
        ({"method": "mopd", "experts": EXPERTS}, "has no Phase I; set kind: fixed and explore_steps: 0"),
        ({"method": "static_opd", "student": "text", "topology": "none", **DISTIL}, "text has no teacher"),
        ({"method": "mopd", **DISTIL, "rollout": {"engine": "sglang"}}, "frozen teachers need the embedded engine"),
        ({"method": "mopd", **DISTIL, "teacher": {"where": "resident"}}, "finished experts teach from engines"),
        ({"method": "mixed", "rhythm": "overlap"}, "nobody has a teacher"),
        ({"method": "mixed", "branches": [{**BRANCHES[0], "name": "mixed"}]}, "rename 'mixed'"),
    ],
)
def test_what_does_not_fit_a_method_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, **content)
