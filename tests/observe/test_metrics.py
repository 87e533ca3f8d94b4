"""Metrics files: schema, resuming, merging."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from copd_megatron.errors import CopdError
from copd_megatron.observe.metrics import MetricsWriter, merge_metrics, metrics_path, read_metrics


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_steps(writer: MetricsWriter, first: int, last: int) -> None:
    for step in range(first, last + 1):
        writer.write(step, 0, "explore", **{"reward/mean": step / 7})
        if step % 2 == 0:
            writer.write(step, 0, "probe", **{"overlap/image": 0.9})


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "time"} for line in written(path)]


def test_line_holds_where_it_belongs_and_the_values(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl", "text")
    writer.write(3, 1, "exchange", **{"reward/mean": 1 / 3, "count/groups": 32, "grad_norm": np.float32(0.5)})
    (line,) = written(tmp_path / "m.jsonl")
    assert line.pop("time") > 1.7e9
    assert line == {
        "branch": "text",
        "cycle": 1,
        "phase": "exchange",
        "step": 3,
        "reward/mean": 0.333333,
        "count/groups": 32,
        "grad_norm": 0.5,
    }


def test_line_is_on_file_before_the_next_one(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl", "text")
    writer.write(1, 0, "explore", lr=1e-6)
    assert written(tmp_path / "m.jsonl")[0]["lr"] == 1e-6


def test_number_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl", "text")
    writer.write(1, 0, "explore", grad_norm=math.inf, entropy=math.nan, lr=0.1)
    (line,) = written(tmp_path / "m.jsonl")
    assert (line["grad_norm"], line["entropy"], line["lr"]) == (None, None, 0.1)
    assert line["nonfinite"] == {"grad_norm": "inf", "entropy": "nan"}


@pytest.mark.parametrize("values", [{"time": 1.0}, {"entropy": [1.0]}, {"entropy": np.ones(2)}])
def test_value_that_would_spoil_the_line_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl", "text")
    with pytest.raises(ValueError, match=next(iter(values))):
        writer.write(1, 0, "explore", **values)
    assert written(tmp_path / "m.jsonl") == []


def test_resumed_run_has_the_lines_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = MetricsWriter(tmp_path / "whole.jsonl", "text")
    write_steps(whole, 1, 9)
    crashed = MetricsWriter(tmp_path / "resumed.jsonl", "text")
    write_steps(crashed, 1, 7)
    with open(tmp_path / "resumed.jsonl", "a") as file:
        file.write('{"branch":"text","cycle":0,"pha')
    resumed = MetricsWriter(tmp_path / "resumed.jsonl", "text")
    resumed.truncate_after(4)
    # The checkpoint of step 4 was written before the probe of step 4, which is therefore made again.
    resumed.write(4, 0, "probe", **{"overlap/image": 0.9})
    write_steps(resumed, 5, 9)
    assert timeless(tmp_path / "resumed.jsonl") == timeless(tmp_path / "whole.jsonl")


def test_half_a_line_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"branch":"text","cycle":0,"phase":"explore","step":1}\n{"branch":"te')
    MetricsWriter(path, "text").write(2, 0, "explore")
    assert [line["step"] for line in written(path)] == [1, 2]


def test_interrupted_truncation_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path, "text")
    write_steps(writer, 1, 6)
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.truncate_after(3)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    writer.truncate_after(3)
    assert max(line["step"] for line in written(path)) == 3


def test_reading_a_living_run_changes_nothing(tmp_path: Path) -> None:
    path = metrics_path(tmp_path, "text")
    path.parent.mkdir(parents=True)
    content = '{"branch":"text","cycle":0,"phase":"explore","step":1}\n{"branch":"te'
    path.write_text(content)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    assert path.read_text() == content


@pytest.mark.parametrize("damage", ["not json", "[1]", '{"branch":"text","cycle":0,"phase":"probe"}'])
def test_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    path = metrics_path(tmp_path, "text")
    path.parent.mkdir(parents=True)
    good = '{"branch":"text","cycle":0,"phase":"explore","step":1}'
    path.write_text(f"{good}\n{damage}\n{good}\n")
    with pytest.raises(CopdError, match=r"text/metrics\.jsonl, line 2"):
        read_metrics(tmp_path)


def test_merging_orders_by_step_and_branch_and_keeps_every_line(tmp_path: Path) -> None:
    for branch in ("text", "image"):
        write_steps(MetricsWriter(metrics_path(tmp_path, branch), branch), 1, 3)
    merged = written(merge_metrics(tmp_path))
    assert [(line["step"], line["branch"], line["phase"]) for line in merged] == [
        (1, "image", "explore"),
        (1, "text", "explore"),
        (2, "image", "explore"),
        (2, "image", "probe"),
        (2, "text", "explore"),
        (2, "text", "probe"),
        (3, "image", "explore"),
        (3, "text", "explore"),
    ]
    assert merged == read_metrics(tmp_path)


def test_merged_file_alone_can_be_read(tmp_path: Path) -> None:
    write_steps(MetricsWriter(metrics_path(tmp_path, "text"), "text"), 1, 2)
    lines = read_metrics(tmp_path)
    merge_metrics(tmp_path)
    metrics_path(tmp_path, "text").unlink()
    assert read_metrics(tmp_path) == lines


@pytest.mark.slow
def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, value in ((1, 0.25), (3, 0.75)):
        writer = MetricsWriter(tmp_path / "m.jsonl", "text", tmp_path / "tensorboard" / "text")
        if first > 1:
            writer.truncate_after(first - 1)
        for step in range(first, first + 4):
            writer.write(step, 0, "explore", **{"reward/mean": value, "grad_norm": math.nan})
        writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "text"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    shown = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert shown == [(1, 0.25), (2, 0.25), (3, 0.75), (4, 0.75), (5, 0.75), (6, 0.75)]


def test_what_the_conductor_needs_comes_without_torch() -> None:
    modules = "metrics, timeline, gpu, environment, status, pace, progress, report"
    code = f"import sys; from copd_megatron.observe import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
