"""The GPUs that runs are planned for.

Peaks are those of dense matrices (datasheets often print twice that, for 2:4 sparsity). Memory is in decimal bytes, as
sold; what a driver shows is a little more on H100 and H200.
"""

from __future__ import annotations

from dataclasses import dataclass

from copd_megatron.errors import ConfigError

GPUS_PER_NODE = 8
"""Of an HGX board, whose GPUs are joined by NVLink."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of an 8-GPU node.

    `memory` in bytes; `bf16` and `fp8` in operations per second; `bandwidth` of its memory, `nvlink` to the other GPUs
    of the node and `network` to other nodes in bytes per second and direction.
    """

    name: str
    memory: float
    bf16: float
    fp8: float
    bandwidth: float
    nvlink: float
    network: float
    source: str


_NIC = 400e9 / 8
"""One 400 Gb/s port per GPU, as in NVIDIA's DGX reference designs."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80", 80e9, 989e12, 1979e12, 3.35e12, 450e9, _NIC, "NVIDIA H100 SXM datasheet"),
        Gpu("h200-141", 141e9, 989e12, 1979e12, 4.8e12, 450e9, _NIC, "NVIDIA H200 SXM datasheet"),
        # Of 192 GB on the package HGX boards give 180 to programs (1.4 TB for eight).
        Gpu("b200-192", 180e9, 2250e12, 4500e12, 8.0e12, 900e9, _NIC, "NVIDIA HGX B200 datasheet, 1,000 W"),
    )
}


def gpu_of(name: str) -> Gpu:
    """The GPU called `name`. ConfigError for any other name."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name}: not known; expected one of {', '.join(GPUS)}")
    return GPUS[name]
