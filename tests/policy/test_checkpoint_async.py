"""Training goes on while a checkpoint is written, and the checkpoint is of the moment at which it was begun."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import gang
import pytest
from tiny_policy import make_samples, new_policy, toy_loss, weights_of, worst_difference

from copd_megatron.errors import CopdError
from copd_megatron.policy import async_writer, checkpoint
from copd_megatron.policy import layout as layouts
from copd_megatron.policy.layout import Layout


def train(policy: Any, base: Path, steps: range) -> Any:
    rank, size = layouts.data_parallel_rank(), layouts.data_parallel_size()
    for step in steps:
        policy.update(make_samples(base, prompts=4, group=2, seed=step)[rank::size], toy_loss)
    return policy


@pytest.mark.parametrize(("precision", "distributed"), [("fp32", False), ("bf16", True)])
def test_updates_during_the_write_do_not_reach_the_checkpoint(
    base: Path, tmp_path: Path, gate: threading.Event, precision: str, distributed: bool
) -> None:
    policy = train(new_policy(base, precision=precision, distributed=distributed), base, range(2))
    state = {"position": 2}
    before = weights_of(policy)
    saving = checkpoint.Saving(policy, tmp_path / "step_0000002", state)
    state["position"] = 3
    train(policy, base, range(2, 4))  # would wait for ever if training waited for the writer
    assert not saving.done_everywhere()
    assert checkpoint.valid_steps(tmp_path) == []
    gate.set()
    saving.finish()
    resumed = new_policy(base, precision=precision, distributed=distributed)
    assert checkpoint.load(resumed, tmp_path / "step_0000002") == [{"position": 2}]
    assert worst_difference(weights_of(resumed), before) == 0
    train(resumed, base, range(2, 4))  # moments and master weights, too, are those of step 2
    assert worst_difference(weights_of(resumed), weights_of(policy)) == 0


def test_background_and_direct_write_give_the_same_files(base: Path, tmp_path: Path) -> None:
    policy = train(new_policy(base), base, range(1))
    saving = checkpoint.Saving(policy, tmp_path / "background" / "step_0000001", {})
    saving.finish()
    checkpoint.save(policy, tmp_path / "direct" / "step_0000001", {})
    one, other = (checkpoint.read_manifest(tmp_path / way / "step_0000001") for way in ("background", "direct"))
    assert one is not None
    assert other is not None
    differing = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
    assert differing <= {".metadata"}, "which holds a random identifier"


def test_failed_writer_is_reported_at_the_end_and_costs_nothing_older(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = train(new_policy(base), base, range(1))
    checkpoint.save(policy, tmp_path / "step_0000001", {})

    def full(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(async_writer.FileSystemWriter, "write_data", full)
    saving = checkpoint.Saving(policy, tmp_path / "step_0000002", {})
    train(policy, base, range(1, 2))
    with pytest.raises(CopdError, match=r"step_0000002: the checkpoint could not be written \(.*No space left"):
        saving.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000001"]
    checkpoint.load(new_policy(base), tmp_path / "step_0000001")


def test_attached_file_becomes_part_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "version_0000001.safetensors"
    snapshot.write_bytes(b"weights of the teacher")
    folder = tmp_path / "checkpoints" / "step_0000000"
    saving = checkpoint.Saving(new_policy(base), folder, {}, attached={snapshot.name: snapshot})
    snapshot.unlink()  # superseded while the checkpoint is written
    saving.finish()
    assert (folder / snapshot.name).read_bytes() == b"weights of the teacher"
    (folder / snapshot.name).write_bytes(b"weights of the cheater")
    with pytest.raises(CopdError, match=r"version_0000001\.safetensors differs from its checksum"):
        checkpoint.load(new_policy(base), folder)


def write_badly_on_one_rank(base: Path, root: Path) -> tuple[str, int, list[str]]:
    """Rank 1's writer fails in the background: what this rank is told, and when; the threads that remain."""
    layouts.initialize(Layout(world=2))
    policy = new_policy(base, Layout(world=2), distributed=True)
    if layouts.data_parallel_rank() == 1:

        def broken(*arguments: Any) -> Any:
            raise OSError(5, "Input/output error")

        async_writer.FileSystemWriter.write_data = broken  # type: ignore[method-assign]
    saving = checkpoint.Saving(policy, root / "step_0000000", {})
    train(policy, base, range(2))
    told = "saved"
    try:
        saving.finish()
    except CopdError as error:
        told = str(error)
    names = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint writer"]
    return told, policy.version, names


def test_failure_of_one_ranks_writer_is_everyones(base: Path, tmp_path: Path) -> None:
    for told, version, threads in gang.run(2, write_badly_on_one_rank, base, tmp_path):
        assert "Input/output error" in told
        assert version == 2
        assert not threads
    assert os.listdir(tmp_path) == []
