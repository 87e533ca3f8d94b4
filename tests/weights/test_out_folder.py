"""What a killed process has left is cleared away by the next one; what a live one is writing is not."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from copd_megatron.errors import WeightsError
from copd_megatron.weights import out_folder
from copd_megatron.weights.out_folder import clear_leftovers, refuse_small_disk, whole_folder


def _write(out: Path, ready: Connection, killed_at: str) -> None:
    """Write a folder up to a point, and wait there to be killed or told to go on."""

    def pause() -> None:
        ready.send("")
        ready.recv()

    rename = Path.rename

    def slow(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            pause()
        return rename(self, target)

    if killed_at == "exchange":
        Path.rename = slow  # type: ignore[method-assign]
    with whole_folder(out, "marker", overwrite=True) as folder:
        (folder / "marker").write_text("new")
        if killed_at == "work":
            pause()


@contextmanager
def writer(out: Path, killed_at: str = "work") -> Iterator[tuple[multiprocessing.Process, Connection]]:
    """A process that is at that point."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_write, args=(out, theirs, killed_at))
    process.start()
    ours.recv()
    try:
        yield process, ours  # type: ignore[misc]
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join()


def hidden(folder: Path) -> list[str]:
    return sorted(path.suffix for path in folder.glob(".*"))


def test_next_process_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out):
        pass
    assert hidden(tmp_path) == [".tmp"]
    with whole_folder(out, "marker", overwrite=False) as folder:
        assert list(tmp_path.iterdir()) == [folder]
        (folder / "marker").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "marker").read_text() == "second"


def test_folder_of_a_live_process_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writer(out) as (process, connection):
        clear_leftovers(out)
        assert hidden(tmp_path) == [".tmp"]
        connection.send("")
        process.join()
    assert (out / "marker").read_text() == "new"
    assert hidden(tmp_path) == []


def test_old_folder_is_put_back_after_a_kill_in_the_exchange(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "marker").write_text("old")
    with writer(out, killed_at="exchange"):
        clear_leftovers(out)  # of a live process
        assert not out.exists()
        assert hidden(tmp_path) == [".old", ".tmp"]
    with pytest.raises(WeightsError, match="is not empty"), whole_folder(out, "marker", overwrite=False):
        pass
    assert (out / "marker").read_text() == "old"
    assert hidden(tmp_path) == []


def test_other_folders_are_not_taken_for_leftovers(tmp_path: Path) -> None:
    names = [".out.7.8.tmp", ".out.x.tmp", ".other.7.tmp", ".out.tmp", "out.7.tmp", ".out.7.tmpx"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".out.9.tmp").write_text("a file")
    clear_leftovers(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, ".out.9.tmp"])


def test_folder_that_is_cleared_between_its_making_and_its_locking_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, unlucky = out_folder._locked, iter([True, False])

    def slow(folder: Path, wait: bool) -> int:
        if wait and next(unlucky, False):
            folder.rmdir()
        return lock(folder, wait)

    monkeypatch.setattr(out_folder, "_locked", slow)
    with whole_folder(tmp_path / "out", "marker", overwrite=False) as folder:
        (folder / "marker").write_text("")
    assert (tmp_path / "out" / "marker").exists()


def test_outputs_on_one_disk_need_their_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = out_folder.shutil.disk_usage(tmp_path)._replace(free=300_000_000)
    monkeypatch.setattr(out_folder.shutil, "disk_usage", lambda path: usage)
    refuse_small_disk({tmp_path / "a": 100_000_000})
    with pytest.raises(WeightsError, match=r"b: 334\.2 MB are needed, .* has 300\.0 MB left"):
        refuse_small_disk({tmp_path / "a": 100_000_000, tmp_path / "b": 100_000_000})
