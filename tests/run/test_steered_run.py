"""A run whose phases end by measured overlap: all branches switch together, also after being killed and resumed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from tiny_run import TINY, Command, comparable

# Bounds that an untrained model's overlap crosses within a few updates, probed after each of them.
RHYTHM = {
    "kind": "overlap",
    "cycles": 2,
    "explore_steps": 3,
    "exchange_steps": 2,
    "explore_bounds": [1, 5],
    "exchange_bounds": [1, 5],
    "low": 0.97,
    "high": 0.985,
    "low_support": None,
    "sureness": 0.0,
    "smoothing": 1.0,
    "patience": 1,
}


def steered(folder: Path, base: Path, **changes) -> Command:
    return Command(folder, base, **{"rhythm": RHYTHM, "log": {**TINY["log"], "probe_every": 1}, **changes})


def switches(run: Command, branch: str) -> list[dict]:
    return [line for line in run.lines(branch) if line["phase"] == "switch"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["overlap", "absorption"])
def test_killed_run_switches_at_the_same_updates_to_the_same_bits(tmp_path, base, kind):
    rhythm = {**RHYTHM, "kind": kind, "range": [0.9, 1.0]}
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = steered(tmp_path / "whole", base, rhythm=rhythm)
    status, output = whole.finish(timeout=600)
    assert status == 0, output
    found = switches(whole, "text")
    assert found[-1]["step"] == 10
    assert found[-1]["reason"] == "the run is over"
    assert any("overlap of" in line["reason"] for line in found), found
    assert [line["ended"] for line in found] == ["explore", "exchange"] * (len(found) // 2)
    assert [(line["step"], line["reason"]) for line in switches(whole, "image")] == [
        (line["step"], line["reason"]) for line in found
    ]
    assert (
        f"ended after update {found[0]['step']}: {found[0]['reason']}"
        in (whole.run / "branches/text/log.txt").read_text()
    )
    log = (whole.run / "run.log").read_text()
    for line in found:
        assert line["reason"] in (whole.run / "report.html").read_text()
        assert log.count(f"ended after update {line['step']}: {line['reason']}") == 1

    # Killed in the middle of a phase, where what the rhythm remembers is more than where it stands.
    killed = steered(tmp_path / "killed", base, rhythm=rhythm, supervision={"max_restarts": 0})
    process = killed.start()
    killed.wait_for(process, "image", lambda lines: any(line["step"] == 6 for line in lines))
    killed.rank("image").send_signal(signal.SIGKILL)
    status, output = killed.finish(process, timeout=600)
    assert status == 1, output
    status, output = killed.finish(timeout=600)
    assert status == 0, output
    assert "continuing from step" in output
    assert killed.weights() == whole.weights()
    for name in ("text", "image"):
        assert comparable(killed.lines(name)) == comparable(whole.lines(name))


def test_what_steers_may_not_change_on_the_way(tmp_path):
    from copd_megatron.config import RunConfig, load_config
    from copd_megatron.run_folder import mathematical_changes

    run = steered(tmp_path, tmp_path / "base")
    plain = load_config(run.config, [], RunConfig).model_dump(mode="json")
    other = load_config(run.config, ["log.probe_every=2", "log.tensorboard=true"], RunConfig).model_dump(mode="json")
    assert mathematical_changes(plain, other) == ["log.probe_every: 1 -> 2"]
    fixed = {**plain, "rhythm": {**plain["rhythm"], "kind": "fixed"}}
    assert mathematical_changes(fixed, {**other, "rhythm": fixed["rhythm"]}) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_ranks_of_all_gangs_switch_together(tmp_path, base):
    branches = [
        {**TINY["branches"][0], "parallel": {"world": 2}},
        {**TINY["branches"][1], "parallel": {"world": 2, "tp": 2}},
    ]
    run = steered(tmp_path, base, branches=branches)
    status, output = run.finish(timeout=600)
    assert status == 0, output
    found = {name: [(line["step"], line["reason"]) for line in switches(run, name)] for name in ("text", "image")}
    assert found["text"] == found["image"]
    assert found["text"][-1] == (10, "the run is over")
    for name in ("text", "image"):
        states = sorted((run.run / "branches" / name / "checkpoints").glob("step_*/state.json"))
        ranks = json.loads(states[-1].read_text())["ranks"]
        assert len(ranks) == 2
        assert ranks[0]["rhythm"] == ranks[1]["rhythm"]
        assert ranks[0]["rhythm"]["ends"][-1] == 10
