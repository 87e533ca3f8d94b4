"""Checkpoints: exact, whole or not there at all, and nothing is read that was not written by us."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_policy import SIZE, base_folder, make_samples, new_policy, toy_loss, weights_of, worst_difference

from copd_megatron import files
from copd_megatron.errors import CopdError
from copd_megatron.policy import checkpoint, manifest

from megatron.core.tensor_parallel.random import get_cuda_rng_tracker  # isort: skip - after copd_megatron.policy


@pytest.fixture(scope="module")
def trained(base: Path) -> Any:
    """A policy with three updates behind it; tests only read it."""
    return train(new_policy(base), base, range(3))


def train(policy: Any, base: Path, steps: range) -> Any:
    for step in steps:
        policy.update(make_samples(base, prompts=3, group=2, seed=step), toy_loss)
    return policy


def moments(policy: Any) -> list[torch.Tensor]:
    """Adam's state of every parameter, its step count included."""
    found = []
    for part in policy.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [state["step"], state["exp_avg"], state["exp_avg_sq"], parameter.detach()]
    return [tensor.clone() for tensor in found]


def assert_same(policy: Any, other: Any) -> None:
    assert worst_difference(weights_of(policy), weights_of(other)) == 0
    pairs = list(zip(moments(policy), moments(other), strict=True))
    assert pairs
    assert all(torch.equal(one, two) for one, two in pairs)
    assert policy.version == other.version


@pytest.mark.parametrize(
    ("precision", "distributed"), [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]
)
def test_resumed_run_equals_one_never_stopped(base: Path, tmp_path: Path, precision: str, distributed: bool) -> None:
    settings: dict[str, Any] = {"precision": precision, "distributed": distributed, "warmup_steps": 5}
    policy = train(new_policy(base, **settings), base, range(3))
    checkpoint.save(policy, tmp_path / "step_0000003", {"sampler": [1, 2]})
    resumed = new_policy(base, **settings)
    assert checkpoint.load(resumed, tmp_path / "step_0000003") == [{"sampler": [1, 2]}]
    assert_same(resumed, policy)
    for one in (policy, resumed):
        train(one, base, range(3, 6))
    assert_same(resumed, policy)
    assert resumed.version == 6


def test_policy_can_be_saved_before_its_first_update(base: Path, tmp_path: Path) -> None:
    policy = new_policy(base)
    checkpoint.save(policy, tmp_path / "step_0000000", {})
    resumed = train(new_policy(base), base, range(5, 7))  # what it has learned is forgotten
    checkpoint.load(resumed, tmp_path / "step_0000000")
    assert resumed.version == 0
    for one in (policy, resumed):
        train(one, base, range(2))
    assert_same(resumed, policy)


def test_skipped_updates_in_a_row_are_remembered(base: Path, tmp_path: Path) -> None:
    policy = train(new_policy(base), base, range(1))
    policy.update(make_samples(base, 2, 2), lambda *arguments: (toy_loss(*arguments)[0] * float("nan"), {}))
    checkpoint.save(policy, tmp_path / "step_0000002", {})
    resumed = new_policy(base)
    checkpoint.load(resumed, tmp_path / "step_0000002")
    assert (resumed.version, resumed.skipped_in_a_row) == (2, 1)


def test_incomplete_folders_are_no_checkpoints(trained: Any, tmp_path: Path) -> None:
    for step in (3, 10, 20):
        checkpoint.save(trained, checkpoint.step_folder(tmp_path, step), {})
    (tmp_path / "step_0000010" / "manifest.json").unlink()
    largest = max((tmp_path / "step_0000020").iterdir(), key=lambda file: file.stat().st_size)
    os.truncate(largest, 1000)
    (tmp_path / "step_later").mkdir()
    (tmp_path / "step_0000030").mkdir()
    (tmp_path / "step_0000040").mkdir()
    (tmp_path / "step_0000040" / "manifest.json").write_text("{}")
    assert checkpoint.valid_steps(tmp_path) == [3]
    assert checkpoint.newest_valid(tmp_path) == 3
    assert checkpoint.newest_valid(tmp_path / "nowhere") is None
    with pytest.raises(CopdError, match=r"not a usable checkpoint: .* has 1000 bytes, manifest\.json says"):
        checkpoint.load(trained, tmp_path / "step_0000020")


def test_removed_checkpoint_is_gone_at_once(trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(trained, checkpoint.step_folder(tmp_path, 3), {})

    def interrupted(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(manifest.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manifest.remove(checkpoint.step_folder(tmp_path, 3))
    assert checkpoint.valid_steps(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == [".step_0000003.tmp"]
    manifest.remove(tmp_path / ".step_0000003.tmp")
    assert list(tmp_path.iterdir()) == []


def test_newer_format_is_refused_and_named(trained: Any, tmp_path: Path) -> None:
    folder = checkpoint.step_folder(tmp_path, 3)
    checkpoint.save(trained, folder, {})
    content = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**content, "format": manifest.FORMAT + 1}))
    with pytest.raises(CopdError, match=r"it has format 2, this version reads up to 1; use a newer copd-megatron"):
        checkpoint.load(trained, folder)
    (folder / "manifest.json").write_text(json.dumps({"files": content["files"]}))
    with pytest.raises(CopdError, match="no format number"):
        checkpoint.load(trained, folder)


def test_default_random_generators_go_on_where_they_stood(trained: Any, base: Path, tmp_path: Path) -> None:
    def drawn() -> list[float]:
        with get_cuda_rng_tracker().fork():
            tracked = float(torch.rand(()))
        return [random.random(), random.gauss(), float(np.random.rand()), float(torch.rand(())), tracked]

    random.gauss()  # leaves a spare number behind, which is state too
    checkpoint.save(trained, tmp_path / "step_0000003", {})
    expected = drawn()
    assert drawn() != expected
    checkpoint.load(new_policy(base), tmp_path / "step_0000003")
    assert drawn() == expected


class _Payload:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return (os.system, (f"touch {self.target}",))


def test_tampered_checkpoint_is_refused_before_anything_is_unpickled(trained: Any, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step_0000003"
    checkpoint.save(trained, folder, {})
    size = (folder / ".metadata").stat().st_size
    payload = pickle.dumps(_Payload(tmp_path / "ran"))
    (folder / ".metadata").write_bytes(payload + b"\0" * (size - len(payload)))
    assert checkpoint.valid_steps(tmp_path) == [3], "sizes alone do not show it"
    policy = new_policy(base)
    with pytest.raises(CopdError, match=r"\.metadata differs from its checksum in manifest\.json"):
        checkpoint.load(policy, folder)
    assert not (tmp_path / "ran").exists()
    assert policy.version == 0


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write more to any file, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [20, 1000, 30_000])
def test_failed_write_leaves_older_checkpoints_untouched(trained: Any, base: Path, tmp_path: Path, size: int) -> None:
    checkpoint.save(trained, tmp_path / "step_0000003", {"kept": True})
    with no_file_larger_than(size), pytest.raises(CopdError, match="could not be written") as raised:
        checkpoint.save(trained, tmp_path / "step_0000004", {})
    assert "Traceback" not in str(raised.value)
    with no_file_larger_than(size), pytest.raises(CopdError, match="could not be written"):
        checkpoint.save(trained, tmp_path / "step_0000003", {})
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]
    assert checkpoint.load(new_policy(base), tmp_path / "step_0000003") == [{"kept": True}]


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_full_disk_at_the_very_end_leaves_no_checkpoint(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    original = files.write_atomic

    def write(path: Path, content: str) -> None:
        if path.name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    for module in (checkpoint, manifest):
        monkeypatch.setattr(module, "write_atomic", write)
    with pytest.raises(CopdError, match="No space left on device"):
        checkpoint.save(trained, tmp_path / "step_0000004", {})
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_run_is_refused_with_the_difference(
    trained: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "step_0000003"
    checkpoint.save(trained, folder, {})
    with pytest.raises(CopdError, match="saved with precision 'float32', this run has 'bfloat16'"):
        checkpoint.load(new_policy(base, precision="bf16"), folder)
    with pytest.raises(CopdError, match=r"optimizer\.distributed False, this run has True"):
        checkpoint.load(new_policy(base, distributed=True), folder)
    monkeypatch.setattr("tiny_policy.SIZE", replace(SIZE, mlp=32))
    other = new_policy(base_folder(tmp_path / "smaller"))
    before = weights_of(other)
    with pytest.raises(CopdError, match=r"text_config\.intermediate_size 48, this run has 32"):
        checkpoint.load(other, folder)
    assert worst_difference(weights_of(other), before) == 0


def test_manifest_lists_every_file_with_its_checksum(trained: Any, tmp_path: Path) -> None:
    folder = tmp_path / "step_0000003"
    checkpoint.save(trained, folder, {"step": 3})
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert all(set(entry) == {"bytes", "sha256"} for entry in files.values())
