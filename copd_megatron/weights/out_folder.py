"""The folder that is to be written: what is refused before the work, and how it is whole or not there at all.

It grows under a hidden name beside its place, `.NAME.PID.tmp`, and is then renamed. While it does, its process holds a
lock on it, which the system lets go when the process ends however that happens: what a killed one has left can be told
from what is still being written.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.filesize import decimal
from safetensors import SafetensorError

from copd_megatron.errors import WeightsError
from copd_megatron.files import sync_folder
from copd_megatron.weights.crew import ALONE, Crew

logger = logging.getLogger(__name__)

SPARE_BYTES = 64 * 2**20
"""What a folder may take beyond its tensors: indices, headers, tokenizer."""


def open_place(out: Path, marker: str, overwrite: bool, crew: Crew = ALONE) -> None:
    """Clear away what killed processes have left of `out`, and refuse it if it has content. Collective."""
    crew.together(lambda: clear_leftovers(out) if crew.rank == 0 else None)
    crew.together(lambda: refuse_content(out, marker, overwrite))


@contextmanager
def whole_folder(out: str | os.PathLike[str], marker: str, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary folder beside `out`; on success it takes the place of `out`, on failure it is removed.

    Raises WeightsError if `out` has content, unless `overwrite`; and even then if `out` holds no file called `marker`,
    because then it is something else than what would replace it.
    """
    target = Path(out).absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    clear_leftovers(target)
    refuse_content(out, marker, overwrite)
    try:
        with _made(temporary):
            yield temporary
            sync_folder(temporary)
            take_place(temporary, target)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{out}: could not be written ({error}); it is as it was before") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def take_place(folder: Path, target: Path) -> None:
    """Give `folder` the name of `target`, which lies beside it and is removed; if this fails, `target` is as it was."""
    replaced = target.with_name(f".{target.name}.{os.getpid()}.old")
    if not target.exists():
        folder.rename(target)
        sync_folder(target.parent)
        return
    with _held(target):
        target.rename(replaced)
        try:
            folder.rename(target)
        except BaseException:
            replaced.rename(target)
            raise
        sync_folder(target.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def refuse_content(out: str | os.PathLike[str], marker: str, overwrite: bool) -> None:
    """Raise WeightsError if `whole_folder` would, before any work is done for it."""
    target = Path(out)
    if not target.exists():
        return
    if not target.is_dir():
        raise WeightsError(f"{target}: is a file; expected a new or empty folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise WeightsError(f"{target}: is not empty; choose another folder or allow overwriting")
    if not (target / marker).is_file():
        raise WeightsError(f"{target}: has no {marker}, so it is not a folder of this kind; it is left alone")


def refuse_small_disk(needed: Mapping[Path, int]) -> None:
    """Raise WeightsError if so many bytes do not fit beside what is in these places now."""
    on_disk: dict[int, int] = {}
    for out, count in needed.items():
        folder = next(parent for parent in out.absolute().parents if parent.is_dir())
        disk = folder.stat().st_dev
        on_disk[disk] = on_disk.get(disk, 0) + count + SPARE_BYTES
        free = shutil.disk_usage(folder).free
        if free < on_disk[disk]:
            raise WeightsError(
                f"{out}: {decimal(on_disk[disk])} are needed, {folder} has {decimal(free)} left (what is overwritten "
                "stays until the new folder is complete); make room or choose another place"
            )


def clear_leftovers(out: str | os.PathLike[str]) -> None:
    """Remove what killed processes have left of their attempts to write `out`.

    One that was killed just as it exchanged the folders has left the old one under another name: it is put back.
    """
    target = Path(out).absolute()
    if not target.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(target.name)}\.\d+\.(tmp|old)")
    for folder in sorted(target.parent.iterdir()):
        found = ours.fullmatch(folder.name)
        if not found or not folder.is_dir() or folder.is_symlink():
            continue
        # Whose lock cannot be had is being written, or lies where there are no locks and nothing can be known.
        with suppress(OSError), _held(folder, wait=False):
            if found[1] == "old" and not target.exists():
                folder.rename(target)
                logger.warning("%s: put back; a process was killed when it replaced it", target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
                logger.info("%s: removed; a process was killed when it wrote it", folder)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it."""
    handle = _new(folder)
    try:
        yield
    finally:
        os.close(handle)


def _new(folder: Path) -> int:
    """Make `folder`; its handle, which holds it."""
    while True:
        folder.mkdir(parents=True)
        # Between its making and its holding somebody else may take it for a leftover.
        with suppress(FileNotFoundError):
            handle = _locked(folder, wait=True)
            if folder.exists() and os.path.samestat(os.fstat(handle), folder.stat()):
                return handle
            os.close(handle)


@contextmanager
def _held(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `folder`, whatever it is called meanwhile; without `wait`, OSError if it cannot be had."""
    handle = _locked(folder, wait)
    try:
        yield
    finally:
        os.close(handle)


def _locked(folder: Path, wait: bool) -> int:
    """A handle of `folder` that has its lock. With `wait`, one without a lock where there are none; else OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        if not wait:
            os.close(handle)
            raise
    return handle
