"""When a checkpoint of several branches counts: a real policy and store, and a peer that the test plays."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tiny_policy import make_samples, new_policy, toy_loss

from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError, PeerLost
from copd_megatron.exchange import Exchange, Supervision
from copd_megatron.policy import async_writer
from copd_megatron.policy.manifest import describe, write_manifest
from copd_megatron.run_checkpoints import RunCheckpoints
from copd_megatron.run_folder import RunFolder
from copd_megatron.worker.checkpointer import Checkpointer
from copd_megatron.worker.spokesman import Spokesman

NAMES = ["text", "image"]
BRANCHES = [{"name": name, "data": {"mini": {"modality": name}}} for name in NAMES]


class Run:
    """Branch "text", whose checkpoints are tested, and its peer "image"."""

    def __init__(self, base: Path, path: Path, **settings: Any) -> None:
        self.base = base
        changes = {"base": str(base), "run_dir": str(path), "checkpoint": {"keep": 2, **settings}}
        self.config = RunConfig.model_validate({"branches": BRANCHES, **changes})
        self.folder = RunFolder(path)
        self.folder.open(self.config)
        self.checkpoints = RunCheckpoints(self.folder, NAMES)
        self.store = dist.HashStore()
        own, self.peer = Exchange(self.store, "text"), Exchange(self.store, "image")
        own.know(NAMES, wait_seconds=20)
        self.peer.know(NAMES, wait_seconds=20)
        self.policy = new_policy(base)
        self.checkpointer = Checkpointer(
            self.config, "text", self.folder, self.policy, Spokesman(own, self.folder.branch("text"), None), 0
        )

    def train(self) -> None:
        self.policy.update(make_samples(self.base, prompts=2, group=2, seed=self.policy.version), toy_loss)

    def save(self) -> None:
        self.checkpointer.save({"cycle": 0, "phase": "explore"}, {"streams": None}, {})

    def peer_saves(self, step: int) -> None:
        part = self.checkpoints.part("image", step)
        part.mkdir(parents=True)
        (part / "shard").write_text(f"image {step}")
        write_manifest(part, {"shard": describe(part / "shard")})
        self.peer.saved(step, json.dumps(self.checkpoints.entry("image", step)))

    def poll_until_written(self) -> None:
        saving = self.checkpointer._saving
        while saving is not None and not saving.done_everywhere():
            pass
        self.checkpointer.poll()


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    return Run(base, tmp_path / "run")


def test_checkpoint_counts_when_every_branch_has_its_part(run: Run) -> None:
    run.train()
    run.save()
    run.poll_until_written()
    assert run.checkpoints.part("text", 1).exists()
    run.checkpointer.poll()
    assert run.checkpoints.steps() == [], "the peer's part is missing"
    run.peer_saves(1)
    run.checkpointer.poll()
    assert run.checkpoints.steps() == [1]
    assert run.checkpoints.problem(1, run.config, contents=True) is None
    run.checkpointer.wait()  # nothing is under way: returns at once


def test_peer_may_be_the_one_that_commits(run: Run) -> None:
    run.train()
    run.save()
    run.peer_saves(1)
    written: list[Any] = []
    run.checkpointer._finish_part()
    assert run.peer.commit(1, written.append, wait=False)
    run.checkpointer.poll()
    assert set(written[0]) == {"text", "image"}
    assert run.checkpoints.steps() == [], "written by the peer, or not at all"
    assert run.checkpointer._awaited is None


def test_training_goes_on_until_the_next_save_which_waits(run: Run, gate: threading.Event) -> None:
    run.train()
    run.save()
    for _ in range(2):
        run.train()
        run.checkpointer.poll()
    assert not run.checkpoints.part("text", 1).exists()
    order = []
    threading.Timer(0.5, lambda: (order.append("released"), gate.set(), run.peer_saves(1))).start()
    run.save()
    order.append("second begun")
    assert order == ["released", "second begun"]
    assert run.checkpoints.steps() == [1]
    run.peer_saves(3)
    run.checkpointer.wait()
    assert run.checkpoints.steps() == [1, 3]


def test_same_step_is_saved_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train()
    run.save()
    first = run.checkpointer._saving
    run.save()
    assert run.checkpointer._saving is first


def test_synchronous_save_is_on_disk_when_it_returns(base: Path, tmp_path: Path) -> None:
    run = Run(base, tmp_path / "run", asynchronous=False)
    run.train()
    run.peer_saves(1)
    run.save()
    assert run.checkpoints.steps() == [1]
    assert run.checkpoints.problem(1, run.config, contents=True) is None


def test_old_checkpoints_go_after_the_new_one_counts(base: Path, tmp_path: Path) -> None:
    run = Run(base, tmp_path / "run", keep=1, keep_every_steps=2)
    for step in (1, 2, 3):
        run.train()
        run.save()
        run.checkpointer._finish_part()
        before = run.checkpoints.steps()
        assert all(run.checkpoints.part("text", old).exists() for old in before)
        run.peer_saves(step)
        run.checkpointer.poll()
    assert run.checkpoints.steps() == [2, 3]
    kept = sorted(path.name for path in run.checkpoints.part("text", 1).parent.iterdir())
    assert kept == ["step_0000002", "step_0000003"]


def test_full_disk_is_told_at_the_next_boundary_and_older_ones_stay(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train()
    run.save()
    run.peer_saves(1)
    run.checkpointer.wait()

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(async_writer.FileSystemWriter, "write_data", full)
    run.train()
    run.save()
    run.train()
    with pytest.raises(CopdError, match=r"step_0000002: the checkpoint could not be written .*No space left"):
        run.poll_until_written()
    assert run.checkpoints.steps() == [1]
    assert run.checkpoints.problem(1, run.config, contents=True) is None
    assert [path.name for path in run.checkpoints.part("text", 1).parent.iterdir()] == ["step_0000001"]


def test_full_disk_at_the_commit_is_told_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.train()
    run.save()
    run.peer_saves(1)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("copd_megatron.run_checkpoints.write_atomic", full)
    with pytest.raises(CopdError, match=r"step 1 could not be completed .*No space left"):
        run.checkpointer.wait()
    assert run.checkpoints.steps() == []


def test_lost_peer_ends_the_wait(run: Run) -> None:
    run.train()
    run.save()
    Supervision(run.store, NAMES).lost("image", "killed by signal 9")
    with pytest.raises(PeerLost, match=r"'image' is gone \(killed by signal 9\)"):
        run.checkpointer.wait()
    assert run.checkpoints.steps() == []


def test_resumed_run_does_not_save_its_own_starting_point_again(run: Run) -> None:
    resumed = Checkpointer(run.config, "text", run.folder, run.policy, None, run.policy.version)
    resumed.save({}, {"streams": None}, {})
    assert resumed._saving is None
    assert not run.checkpoints.part("text", 0).exists()
