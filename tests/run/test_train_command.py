"""`copd train` from start to end, and what a user finds afterwards."""

import json
import signal

import pytest
import yaml
from tiny_run import Command, comparable

from copd_megatron.data.prompts import load_processor
from copd_megatron.observe.events import read_events


def test_run_leaves_everything_a_user_expects(undisturbed):
    run = undisturbed.run
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "report.html", "run.log", "merged/config.json"):
        assert (run / name).exists(), name
    table = json.loads((run / "evaluation.json").read_text())
    assert [model["name"] for model in table["models"]] == ["base", "text branch", "image branch", "merged"]
    assert set(table["models"][0]["capabilities"]) == {"text", "image"}


def test_merged_folder_loads_in_transformers_and_is_the_mean_of_the_branches(undisturbed):
    load_processor(undisturbed.run / "merged")
    from transformers import AutoModelForImageTextToText

    models = {
        name: AutoModelForImageTextToText.from_pretrained(undisturbed.run / path).state_dict()
        for name, path in {"text": "branches/text/final", "image": "branches/image/final", "merged": "merged"}.items()
    }
    changed = 0
    for name, merged in models["merged"].items():
        text, image = models["text"][name], models["image"][name]
        assert merged.allclose((text + image) / 2, atol=1e-7), name
        changed += not text.equal(image)
    assert changed > 50


def test_metrics_tell_both_phases_and_the_drift_between_the_branches(undisturbed):
    for branch, peer in (("text", "image"), ("image", "text")):
        lines = undisturbed.lines(branch)
        updates = [line for line in lines if line["phase"] in ("explore", "exchange")]
        assert [line["step"] for line in updates] == [1, 2, 3, 4, 5, 6]
        assert [line["phase"] for line in updates] == ["explore"] * 3 + ["exchange"] * 3
        assert all(f"overlap/{peer}" in line for line in updates[3:])
        probes = [line for line in lines if line["phase"] == "probe"]
        assert [line["step"] for line in probes] == [0, 2, 3, 4, 6]
        start = probes[0]
        assert start[f"overlap/{peer}"] == 1.0
        assert abs(start[f"symkl/{peer}"]) < 1e-6
        assert start["kl_to_base"] == pytest.approx(0.0, abs=1e-6)
        assert start[f"support/{peer}"] == 0.0
        assert probes[-1]["kl_to_base"] > 0
        assert probes[-1][f"symkl/{peer}"] > 0


def test_finished_run_is_not_trained_again(undisturbed):
    before = undisturbed.weights()
    status, output = undisturbed.finish()
    assert status == 0, output
    assert undisturbed.weights() == before


def test_run_directory_of_another_configuration_is_refused_with_the_difference(undisturbed):
    description = yaml.safe_load(undisturbed.config.read_text())
    other = undisturbed.config.with_name("other.yaml")
    other.write_text(yaml.safe_dump({**description, "optimizer": {"lr": 0.5}}))
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "copd_megatron.cli", "train", str(other)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "optimizer.lr: 0.001 -> 0.5" in done.stderr


def test_missing_base_is_refused_before_anything_starts(tmp_path):
    command = Command(tmp_path, tmp_path / "no_such_base")
    status, output = command.finish()
    assert status == 2
    assert "no_such_base is not a Hugging Face folder" in output
    assert not command.run.exists()


def test_branch_that_cannot_start_tells_the_reason(tmp_path, base):
    config = {"branches": [{"name": "text", "data": {"mini": {"modality": "text"}}, "parallel": {"world": 1}}]}
    command = Command(tmp_path, base, **config, topology="none", data={"max_prompt_tokens": 3})
    status, output = command.finish()
    assert status == 1
    assert "no validation prompt can be used" in output
    assert "prompt too long" in output


@pytest.mark.parametrize(
    ("branch", "phase"), [pytest.param("text", "explore", marks=pytest.mark.slow), ("image", "exchange")]
)
def test_run_goes_on_by_itself_after_a_rank_is_killed(command, undisturbed, branch, phase):
    process = command.start()
    command.wait_for(process, branch, lambda lines: any(line["phase"] == phase for line in lines))
    command.rank(branch).send_signal(signal.SIGKILL)
    status, output = command.finish(process)
    assert status == 0, output
    assert f"{branch}: died without a word" in output
    assert "all branches go on from step" in output
    assert command.weights() == undisturbed.weights()
    for name in ("text", "image"):
        assert comparable(command.lines(name)) == comparable(undisturbed.lines(name))
    kinds = [event["kind"] for event in read_events(command.run) if event["kind"] != "warning"]  # of the one left
    assert kinds == ["start", "failure", "recovery", "start", "end"]


@pytest.mark.slow
def test_run_that_may_not_start_again_stops_with_the_reason_and_the_same_command_goes_on(tmp_path, base, undisturbed):
    command = Command(tmp_path, base, supervision={"max_restarts": 0})
    process = command.start()
    command.wait_for(process, "text", lambda lines: bool(command.checkpoints().steps()))
    command.rank("text").send_signal(signal.SIGKILL)
    status, output = command.finish(process)
    assert status == 1
    assert "branch text: died without a word" in output
    assert "same command continues from step" in output
    assert not (command.run / "merged").exists()

    status, output = command.finish()
    assert status == 0, output
    assert "continuing from step" in output
    assert command.weights() == undisturbed.weights()


@pytest.mark.slow
def test_interrupt_saves_all_branches_at_one_step_and_resumes_to_the_same_bits(command, undisturbed):
    process = command.start()
    command.wait_for(process, "text", lambda lines: len(lines) >= 2)
    process.send_signal(signal.SIGINT)
    status, output = command.finish(process)
    assert status == 130, output
    saved = [
        max(folder.name for folder in (command.run / "branches" / name / "checkpoints").iterdir())
        for name in ("text", "image")
    ]
    assert saved[0] == saved[1]
    status, output = command.finish()
    assert status == 0, output
    assert command.weights() == undisturbed.weights()
