"""A merge leaves the page cache as it found it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from copd_megatron.weights.page_cache import give_back, in_memory
from copd_megatron.weights.tensor_files import Form, TensorReader, TensorWriter

FORMS = {"a": Form(torch.float32, (2**20,)), "b": Form(torch.float32, (2**20,))}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two tensors of 4 MiB, on the disk and in the page cache."""
    writer = TensorWriter(tmp_path / "x.safetensors", FORMS)
    for name in FORMS:
        writer.write(name, 0, torch.ones(2**20))
    writer.close()
    (tmp_path / "x.safetensors").read_bytes()
    return tmp_path / "x.safetensors"


@pytest.fixture
def handle(file: Path) -> Iterator[int]:
    handle = os.open(file, os.O_RDONLY)
    give_back(handle, 0, os.fstat(handle).st_size)
    if in_memory(handle) > 0.1:
        os.close(handle)
        pytest.skip("this file system does not let pages go")
    yield handle
    os.close(handle)


def read(reader: TensorReader, name: str) -> torch.Tensor:
    values = torch.empty(2**20)
    reader.read(name, 0, values)
    return values


def test_share_in_memory_is_counted(handle: int) -> None:
    os.pread(handle, 4 * 2**20, 0)
    assert 0.4 < in_memory(handle) <= 1  # the system reads ahead
    until = time.monotonic() + 10
    while in_memory(handle) > 0.2 and time.monotonic() < until:  # what is on its way from the disk does not go yet
        give_back(handle, 0, os.fstat(handle).st_size)
    assert in_memory(handle) <= 0.2


def test_empty_file_is_all_there(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    handle = os.open(tmp_path / "empty", os.O_RDONLY)
    assert in_memory(handle) == 1
    os.close(handle)


def test_tensors_that_were_not_in_memory_do_not_stay_there(file: Path, handle: int) -> None:
    with TensorReader(file) as reader:
        for name in FORMS:
            assert torch.equal(read(reader, name), torch.ones(2**20))
        assert in_memory(handle) > 0.9
        reader.forget("a")
        assert 0.4 < in_memory(handle) < 0.8  # the system may keep pages by twos, fours … that lie across the end
        reader.forget("b")
        assert in_memory(handle) < 0.5
        assert torch.equal(read(reader, "b"), torch.ones(2**20))
    assert in_memory(handle) < 0.3


def test_tensors_that_were_in_memory_stay_there(file: Path, handle: int) -> None:
    file.read_bytes()
    with TensorReader(file) as reader:
        for name in FORMS:
            read(reader, name)
            reader.forget(name)
    assert in_memory(handle) == 1
