"""The run description: defaults, overrides, and what is said when it is wrong."""

from pathlib import Path

import pytest
import yaml

from copd_megatron.config import RunConfig, load_config, save_config
from copd_megatron.config.load import differences
from copd_megatron.errors import ConfigError

MINIMAL = {
    "base": "base",
    "branches": [
        {"name": "text", "data": {"mini": {"modality": "text"}}},
        {"name": "image", "data": {"mini": {"modality": "image"}}},
    ],
}


def write(tmp_path: Path, content) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content) if not isinstance(content, str) else content)
    return file


def test_only_base_and_branches_are_required(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), [], RunConfig)
    assert config.edges == (("text", "image"), ("image", "text"))
    assert (config.rl.prompts, config.rl.group, config.rl.clip_low, config.rl.clip_high) == (256, 8, 0.2, 0.28)
    assert config.native_prompts == config.cross_prompts == 256
    assert config.opd.loss == "sampled"


def test_overrides_reach_nested_keys_and_references_are_resolved(tmp_path):
    content = {**MINIMAL, "seed": 3, "run_dir": "runs/seed${seed}"}
    config = load_config(write(tmp_path, content), ["seed=5", "rl.prompts=32", "opd.native_prompts=16"], RunConfig)
    assert (config.seed, config.run_dir, config.rl.prompts, config.native_prompts) == (5, "runs/seed5", 32, 16)


def test_an_override_of_a_section_leaves_the_rest_of_it(tmp_path):
    config = load_config(write(tmp_path, {**MINIMAL, "rl": {"prompts": 32}}), ["rl={group: 4}"], RunConfig)
    assert (config.rl.prompts, config.rl.group) == (32, 4)


def test_overrides_reach_the_items_of_a_list(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["branches.1.parallel.world=2", "branches[0].name=words"], RunConfig)
    assert [(branch.name, branch.parallel.world) for branch in config.branches] == [("words", 1), ("image", 2)]


HUB = {
    **MINIMAL,
    "branches": [*MINIMAL["branches"], {"name": "video", "data": {"mini": {"modality": "video"}}}],
    "topology": {"hub": "text"},
}


def test_prompts_of_teachers_are_dealt_out_in_whole_rounds_of_the_ranks(tmp_path):
    config = load_config(write(tmp_path, HUB), ["rl.prompts=32"], RunConfig)
    assert config.lessons("text") == {"image": 16, "video": 16}
    assert config.lessons("image") == {"text": 32}
    config = load_config(write(tmp_path, HUB), ["opd.cross_prompts=10", "branches.0.parallel.world=2"], RunConfig)
    assert config.lessons("text") == {"image": 6, "video": 4}
    assert config.lessons("video") == {"text": 10}
    alone = load_config(write(tmp_path, MINIMAL), ["topology=none"], RunConfig)
    assert alone.lessons("text") == {}


def test_a_teacher_without_prompts_is_refused(tmp_path):
    overrides = ["opd.cross_prompts=2", "branches.0.parallel.world=2"]
    with pytest.raises(ConfigError, match=r"cross_prompts = 2 do not give each of the 2 teachers of text .* to 4"):
        load_config(write(tmp_path, HUB), overrides, RunConfig)


def test_unknown_key_names_the_nearest_valid_one(tmp_path):
    with pytest.raises(ConfigError, match=r"rl\.promts: unknown key; did you mean 'prompts'"):
        load_config(write(tmp_path, MINIMAL), ["rl.promts=32"], RunConfig)
    wrong = [{**MINIMAL["branches"][0], "paralel": {}}]
    with pytest.raises(ConfigError, match=r"branches\.0\.paralel: unknown key; did you mean 'parallel'"):
        load_config(write(tmp_path, {**MINIMAL, "branches": wrong, "topology": "none"}), [], RunConfig)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rl.group=1"], r"rl\.group: .*greater than or equal to 2"),
        (["opd.loss=kl"], r"opd\.loss: .*'sampled'"),
        (["topology=star"], "unknown preset 'star'"),
        (["rhythm.explore_steps=0", "rhythm.exchange_steps=0"], "nothing would be trained"),
        (["rl.prompts"], "expected key=value"),
        (
            ["branches.2.name=video"],
            "'branches.2.name=video': there is nothing at 'branches.2.name' to set: list index",
        ),
        (["branches.text.name=video"], "there is nothing at 'branches.text.name' to set: Index 'text'"),
        (["data.max_prompt_tokens=16385"], "raise it to 32769"),
        (["opd.top_k=4", "log.overlap_k=5"], "raise opd.top_k = 4 or lower log.overlap_k"),
        (["opd.loss=full_jsd"], r"opd\.loss = full_jsd needs the teacher's logits .* set teacher\.where = resident"),
        (["teacher.where=resident", "opd.top_k=129"], r"opd\.top_k = 129: a resident teacher gives at most 128 tokens"),
        (["teacher.where=resident", "precision.fp8=delayed"], "a resident teacher has had none"),
    ],
)
def test_bad_values_are_refused_with_the_key(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, MINIMAL), overrides, RunConfig)


def test_resident_teachers_may_have_frozen_weights_and_losses_over_the_whole_vocabulary(tmp_path):
    changes = ["teacher.where=resident", "teacher.refresh=phase", "rollout.engine=sglang", "opd.loss=full_forward"]
    config = load_config(write(tmp_path, MINIMAL), changes, RunConfig)
    assert (config.teacher.where, config.opd.loss) == ("resident", "full_forward")


def test_branches_with_one_name_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="names must differ"):
        load_config(write(tmp_path, {**MINIMAL, "branches": [MINIMAL["branches"][0]] * 2}), [], RunConfig)


def test_branch_needs_exactly_one_origin_of_data(tmp_path):
    both = {"mini": {"modality": "text"}, "train": {"path": "x.jsonl", "verifier": "math"}}
    with pytest.raises(ConfigError, match="either `mini` or `train`"):
        load_config(write(tmp_path, {**MINIMAL, "branches": [{"name": "text", "data": both}]}), [], RunConfig)


def test_prompts_must_divide_over_data_parallel_ranks(tmp_path):
    branches = [{**MINIMAL["branches"][0], "parallel": {"world": 3}}, MINIMAL["branches"][1]]
    with pytest.raises(ConfigError, match="not a multiple of the 3 data-parallel ranks"):
        load_config(write(tmp_path, {**MINIMAL, "branches": branches}), [], RunConfig)


def test_missing_and_malformed_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "none.yaml", [], RunConfig)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(write(tmp_path, "base: [1, 2"), [], RunConfig)


def test_saved_configuration_loads_to_the_same(tmp_path):
    config = load_config(write(tmp_path, MINIMAL), ["seed=7"], RunConfig)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", [], RunConfig) == config


def test_differences_name_changed_leaves_only():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 5, "d": 3}}
    assert differences(old, new) == ["b.c: 2 -> 5"]


def test_topology_is_read_in_every_form(tmp_path):
    edges = {("text", "image"), ("image", "text")}
    for form in ("pair", "hub", {"hub": "image"}, "mesh", "ring", [{"student": s, "teacher": t} for s, t in edges]):
        assert set(load_config(write(tmp_path, {**MINIMAL, "topology": form}), [], RunConfig).edges) == edges


def test_mistake_in_an_edge_is_reported_as_one(tmp_path):
    with pytest.raises(ConfigError) as failure:
        load_config(write(tmp_path, {**MINIMAL, "topology": [{"studnet": "text", "teacher": "image"}]}), [], RunConfig)
    lines = str(failure.value).splitlines()[1:]
    assert len(lines) == 2
    assert any("unknown key; did you mean 'student'" in line for line in lines)


def test_control_without_teachers_has_no_edges(tmp_path):
    assert load_config(write(tmp_path, MINIMAL), ["method=merge_only"], RunConfig).edges == ()


def test_every_shipped_run_config_is_valid():
    folder = Path(__file__).parents[2] / "configs"
    files = [file for file in folder.rglob("*.yaml") if "branches" in yaml.safe_load(file.read_text())]
    assert files
    for file in files:
        load_config(file, [], RunConfig)


def test_every_shipped_cold_start_is_valid():
    from copd_megatron.sft import SftSettings

    folder = Path(__file__).parents[2] / "configs"
    files = [file for file in folder.rglob("*.yaml") if "steps" in yaml.safe_load(file.read_text())]
    assert {file.name for file in files} == {"base.yaml", "base_conflict.yaml", "base_video.yaml"}
    for file in files:
        assert load_config(file, [], SftSettings).data[0].mini == "text"
