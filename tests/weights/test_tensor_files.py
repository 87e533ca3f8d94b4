"""Slices of safetensors files are read and written as the safetensors library does; a header that lies is refused."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from copd_megatron.errors import WeightsError
from copd_megatron.weights.tensor_files import Form, TensorReader, TensorWriter

FORMATS = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int8,
    torch.bool,
]


def _tensors() -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return {
        f"t{number}": torch.randint(0, 2, (3, number + 5), generator=source).to(dtype)
        for number, dtype in enumerate(FORMATS)
    }


def _file(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def _entry(first: int, last: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(last - first) // 4] if shape is None else shape, "data_offsets": [first, last]}


def test_slices_of_every_format_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "x.safetensors")
    with TensorReader(tmp_path / "x.safetensors") as reader:
        assert reader.forms == {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            part = torch.empty(7, dtype=tensor.dtype)
            reader.read(name, 4, part)
            assert torch.equal(part.view(torch.uint8), tensor.reshape(-1)[4:11].view(torch.uint8)), name


def test_what_is_written_in_slices_from_threads_is_read_by_the_library(tmp_path: Path) -> None:
    tensors = {**_tensors(), "scalar": torch.tensor(2.5), "nothing": torch.empty(0, 4)}
    writer = TensorWriter(
        tmp_path / "x.safetensors", {name: Form(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    )

    def write(name: str) -> None:
        for start in reversed(range(0, tensors[name].numel(), 4)):
            writer.write(name, start, tensors[name].reshape(-1)[start : start + 4])

    threads = [threading.Thread(target=write, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.close()
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert again[name].shape == tensor.shape
        assert torch.equal(again[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        (b"{", b"", "is not valid JSON"),
        (b"[1]", b"", "is a list"),
        (b'{"a": 1, "a": 2}', b"", "'a' occurs twice"),
        ({"a": [0, 4]}, b"0000", "expected dtype, shape and data_offsets"),
        ({"a": {**_entry(0, 4), "more": 1}}, b"0000", "expected dtype, shape and data_offsets"),
        ({"a": _entry(0, 4, dtype="C64")}, b"0000", "number format 'C64'; known: F64"),
        ({"a": _entry(0, 4, [-1])}, b"0000", "whole numbers from 0"),
        ({"a": _entry(0, 4, [True])}, b"0000", "whole numbers from 0"),
        ({"a": _entry(0, 4, [2])}, b"0000", "takes 8 bytes, its range has 4"),
        ({"a": _entry(0, 8)}, b"0000", "cut short: 4 bytes of tensors, the header promises 8"),
        ({"a": _entry(0, 4)}, b"00000000", "8 bytes of tensors, the header promises 4"),
        ({"a": _entry(0, 8), "b": _entry(4, 8)}, b"00000000", "tensor b overlaps"),
        ({"a": _entry(0, 4), "b": _entry(8, 12)}, b"000000000000", "tensor b leaves a gap of 4 bytes"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, header: Any, data: bytes, complaint: str) -> None:
    path = _file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(WeightsError, match=rf"x\.safetensors: .*{complaint}"):
        TensorReader(path)


def test_files_that_are_too_short_or_claim_huge_headers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError, match="cannot be opened"):
        TensorReader(path)
    path.write_bytes(b"123")
    with pytest.raises(WeightsError, match=r"cut short \(3 bytes\)"):
        TensorReader(path)
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="a header of 1099511627776 bytes"):
        TensorReader(path)
    path.write_bytes((100).to_bytes(8, "little") + b"{}")
    with pytest.raises(WeightsError, match="2 of 100 bytes of its header"):
        TensorReader(path)


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    with TensorReader(tmp_path / "x.safetensors") as reader:
        with open(tmp_path / "x.safetensors", "r+b") as file:
            file.truncate(200)
        with pytest.raises(WeightsError, match="ends within tensor a"):
            reader.read("a", 0, torch.empty(100))


def test_slices_beyond_a_tensor_or_of_another_format_are_errors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(10), "b": torch.ones(10)}, tmp_path / "x.safetensors")
    writer = TensorWriter(tmp_path / "y.safetensors", {"a": Form(torch.float32, (10,))})
    with TensorReader(tmp_path / "x.safetensors") as reader:
        for start, part in ((1, torch.empty(10)), (-1, torch.empty(2)), (0, torch.empty(2, dtype=torch.bfloat16))):
            with pytest.raises(ValueError, match="of torch"):
                reader.read("a", start, part)
            with pytest.raises(ValueError, match="do not fit"):
                writer.write("a", start, part)
    writer.close()
