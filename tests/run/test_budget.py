"""What runs have cost, with what they were given."""

import json
from pathlib import Path

import pytest
import yaml

from copd_megatron.budget import read_summary, write_summary
from copd_megatron.config import RunConfig, load_config
from copd_megatron.errors import CopdError
from copd_megatron.run_folder import RunFolder

MINI = [{"name": name, "data": {"mini": {"modality": name}}} for name in ("text", "image")]


def trained(folder: Path, updates: dict[str, tuple[int, int]], **content):
    """A run that has made so many updates of Phase I and II in each branch, 1 s and 10 tokens each."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"base": "base", "run_dir": str(folder), "branches": MINI, **content}))
    config = load_config(file, [], RunConfig)
    for branch, (explore, exchange) in updates.items():
        path = folder / "branches" / branch / "metrics.jsonl"
        path.parent.mkdir(parents=True)
        lines = [{"branch": branch, "cycle": 0, "phase": "probe", "step": 0}]
        for step in range(1, explore + exchange + 1):
            lines.append(
                {"branch": branch, "cycle": 0, "phase": "explore" if step <= explore else "exchange", "step": step,
                 "count/rollouts": 2, "count/rollout_tokens": 10, "time/step": 0.75, "time/between": 0.25}
            )  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return write_summary(config, RunFolder(folder))


def experts(folder: Path, names=("text", "image")) -> dict[str, str]:
    return {name: str(RunFolder(folder).final(name)) for name in names}


def test_branches_train_at_once(tmp_path):
    summary = trained(tmp_path / "copd", {"text": (3, 2), "image": (3, 4)})
    assert summary.branches["text"].model_dump() == {
        "updates": 5, "explore_updates": 3, "exchange_updates": 2, "rollouts": 10, "rollout_tokens": 50, "seconds": 5.0
    }  # fmt: skip
    total = summary.total
    assert (total.updates, total.rollout_tokens, total.seconds) == (12, 120, 12.0)
    assert (total.depth, total.parallel_seconds) == (7, 7.0)
    assert read_summary(tmp_path / "copd") == summary


def test_distillation_comes_after_the_experts_and_counts_each_once(tmp_path):
    trained(tmp_path / "experts", {"text": (6, 0), "image": (8, 0)}, method="merge_only")
    rhythm = {"cycles": 1, "explore_steps": 0, "exchange_steps": 4}
    given = experts(tmp_path / "experts")
    mopd = trained(tmp_path / "mopd", {"mopd": (0, 4)}, method="mopd", experts=given, rhythm=rhythm)
    assert {one.branch for one in mopd.inherited} == {"text", "image"}
    assert (mopd.total.updates, mopd.total.explore_updates, mopd.total.exchange_updates) == (18, 14, 4)
    assert (mopd.total.depth, mopd.total.parallel_seconds) == (12, 12.0)
    assert mopd.unknown == ()
    again = experts(tmp_path / "experts") | {"text": str(RunFolder(tmp_path / "mopd").final("mopd"))}
    second = trained(
        tmp_path / "static", {"text": (0, 4)}, method="static_opd", student="text", experts=again, rhythm=rhythm
    )
    assert second.total.updates == 4 + 4 + 14, "the image expert taught twice and was trained once"
    assert second.total.depth == 4 + 12


def test_experts_of_unknown_origin_are_named(tmp_path):
    rhythm = {"cycles": 1, "explore_steps": 0, "exchange_steps": 4}
    given = experts(tmp_path / "bought")
    summary = trained(tmp_path / "mopd", {"mopd": (0, 4)}, method="mopd", experts=given, rhythm=rhythm)
    assert summary.unknown == tuple(sorted(given.values()))
    assert summary.total.updates == 4


def test_damaged_summary_is_named(tmp_path):
    trained(tmp_path / "copd", {"text": (1, 0), "image": (1, 0)})
    RunFolder(tmp_path / "copd").summary.write_text("{}")
    with pytest.raises(CopdError, match=r"summary\.json"):
        read_summary(tmp_path / "copd")
