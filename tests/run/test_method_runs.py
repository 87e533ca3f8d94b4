"""Every method by its own configuration, a few updates on an untrained model, every part real."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY, Command, comparable

from copd_megatron.budget import read_summary
from copd_megatron.config import RunConfig, load_config
from copd_megatron.data.mini.model import build

METHODS = Path(__file__).parents[2] / "configs" / "mini" / "methods"
FILES = sorted(file.stem for file in METHODS.glob("*.yaml"))
STEPS = {"cycles": 1, "explore_steps": 2, "exchange_steps": 2}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def tiny(folder: Path, base: Path, name: str, experts: Path | None = None, **changes) -> Command:
    """The shipped configuration `name` with tiny sizes: what tells the methods apart stays as it is."""
    shipped = yaml.safe_load((METHODS / f"{name}.yaml").read_text())
    kept = {key: shipped[key] for key in ("method", "student", "branches", "topology") if key in shipped}
    steps = {key: min(STEPS[key], shipped["rhythm"][key]) for key in STEPS}
    rhythm = {**shipped["rhythm"], **steps}
    if experts is not None:
        kept["experts"] = {one: str(experts / "branches" / one / "final") for one in ("text", "image")}
    opd = {**TINY["opd"], "native_prompts": 2 if shipped.get("opd", {}).get("native_prompts") else 0}
    folder.mkdir(exist_ok=True)
    return Command(folder, base, **kept, rhythm=rhythm, opd=opd, **changes)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, base) -> Path:
    """Both experts, trained once."""
    run = tiny(tmp_path_factory.mktemp("experts"), base, "experts")
    status, output = run.finish(timeout=600)
    assert status == 0, output
    return run.run


def models(run: Command) -> list[str]:
    return [model["name"] for model in json.loads((run.run / "evaluation.json").read_text())["models"]]


EXPECTED = {
    "absorption": (["text", "image"], ["text branch", "image branch", "merged"], 8, 4),
    "expert": (["text"], ["text branch"], 2, 2),
    "experts": (["text", "image"], ["text branch", "image branch", "merged"], 4, 2),
    "mixed": (["mixed"], ["mixed branch"], 2, 2),
    "mopd": (["mopd"], ["mopd branch"], 2 + 4, 2 + 2),
    "one_way": (["text", "image"], ["text branch", "image branch", "merged"], 8, 4),
    "overlap": (["text", "image"], ["text branch", "image branch", "merged"], 8, 4),
    "static_opd": (["text"], ["text branch"], 2 + 4, 2 + 2),
}
"""Branches trained, models evaluated beside the base, updates in all, updates in sequence."""


@pytest.mark.parametrize("name", FILES)
def test_method_runs_and_accounts_for_itself(tmp_path, base, experts, name):
    branches, evaluated, updates, depth = EXPECTED[name]
    distils = name in ("static_opd", "mopd")
    run = tiny(tmp_path, base, name, experts if distils else None)
    status, output = run.finish(timeout=600)
    assert status == 0, output
    assert sorted(path.name for path in (run.run / "branches").iterdir()) == sorted(branches)
    assert models(run) == ["base", *evaluated]
    assert (run.run / "merged").exists() == (len(branches) > 1)
    summary = read_summary(run.run)
    assert (summary.total.updates, summary.total.depth) == (updates, depth)
    assert {one.branch for one in summary.inherited} == ({"text", "image"} if distils else set())
    taught = {student for student, _ in load_config(run.config, [], RunConfig).edges}
    for branch in branches:
        lines = run.lines(branch)
        assert any("opd/kl" in line for line in lines) == (branch in taught)
        start = next(line for line in lines if line["phase"] == "probe")
        if distils:
            assert any(key.startswith("overlap/") for key in start)
        assert start["kl_to_base"] == pytest.approx(0, abs=1e-6), "an untrained expert has found nothing to learn"
    if name == "one_way":
        assert "branch image has no teacher" in output
    if name == "mopd":
        assert all("reward/mean" not in line for line in run.lines("mopd")), "it has no own data"


def test_killed_distillation_goes_on_to_the_same_bits(tmp_path, base):
    experts = tmp_path / "strangers"
    for seed, name in ((1, "text"), (2, "image")):
        build(experts / "branches" / name / "final", seed=seed)
    whole = tiny(tmp_path / "whole", base, "static_opd", experts)
    assert whole.finish(timeout=600)[0] == 0
    start = next(line for line in whole.lines("text") if line["phase"] == "probe")
    assert start["kl_to_base"] > 0.001, "it starts from its expert, another model than the base"
    assert start["overlap/image"] < 0.99, "and its teacher is a third one"
    assert len(read_summary(whole.run).unknown) == 2
    killed = tiny(tmp_path / "killed", base, "static_opd", experts)
    process = killed.start()
    killed.wait_for(process, "text", lambda lines: any(line["step"] == 1 for line in lines))
    killed.rank("text").send_signal(signal.SIGKILL)
    assert killed.finish(process, timeout=600)[0] == 1
    status, output = killed.finish(timeout=600)
    assert status == 0, output
    assert killed.weights() == whole.weights()
    assert comparable(killed.lines("text")) == comparable(whole.lines("text"))
