"""Memory, load, power and temperature of this process's GPUs, by NVML; resident memory everywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

GIB = 2**30


class GpuTelemetry:
    """Reads the GPUs that CUDA_VISIBLE_DEVICES leaves visible, or those of them at the positions `devices`.

    A machine without NVIDIA driver or GPU is no error: it has nothing to tell but `rss_gib`. NVML numbers GPUs by PCI
    address; on machines with different GPU models set CUDA_DEVICE_ORDER=PCI_BUS_ID so that CUDA does the same.
    """

    def __init__(self, devices: Sequence[int] | None = None) -> None:
        self._nvml: Any = None
        self._handles: list[Any] = []
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:  # NVML's errors exist only where the import worked; no GPU must never stop a run
            logger.debug("no GPU telemetry: %s", error)
            return
        self._nvml = pynvml
        visible = visible_handles(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._handles = visible if devices is None else [visible[i] for i in devices if i < len(visible)]

    def sample(self) -> dict[str, float]:
        """What the hardware says now.

        `memory_gib` fullest GPU's used memory (GiB, all processes), `gpu/utilisation` mean share of time with a kernel
        running (0 to 1), `gpu/power_watts` sum, `gpu/temperature_celsius` hottest; without GPU none of these.
        `rss_gib` is this process's resident host memory. What a device does not support is left out.
        """
        nvml = self._nvml
        values = {
            "memory_gib": max(self._read(lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).used / GIB), default=None),
            "gpu/utilisation": _mean(self._read(lambda gpu: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)),
            "gpu/power_watts": _sum(self._read(lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1000)),
            "gpu/temperature_celsius": max(
                self._read(lambda gpu: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU))),
                default=None,
            ),
            "rss_gib": resident_gib(),
        }
        return {key: value for key, value in values.items() if value is not None}

    def names(self) -> list[str]:
        """Model names of the GPUs."""
        nvml = self._nvml
        return [_text(nvml.nvmlDeviceGetName(gpu)) for gpu in self._handles]

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml is not None:
            self._nvml.nvmlShutdown()
            self._nvml, self._handles = None, []

    def _read(self, quantity: Callable[[Any], float]) -> list[float]:
        found = []
        for gpu in self._handles:
            try:
                found.append(quantity(gpu))
            except self._nvml.NVMLError as error:
                logger.debug("GPU telemetry: %s", error)
        return found


def visible_handles(nvml: Any, visible: str | None) -> list[Any]:
    """NVML handles of the devices in `visible`, the value of CUDA_VISIBLE_DEVICES (None: all of the machine).

    As in CUDA, entries are numbers, GPU or MIG identifiers (a GPU's may be shortened), and the first entry that names
    no device ends the list.
    """
    machine = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    if visible is None:
        return machine
    found = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdecimal() and int(entry) < len(machine):
            found.append(machine[int(entry)])
        elif entry.startswith("GPU-"):
            matches = [gpu for gpu in machine if _text(nvml.nvmlDeviceGetUUID(gpu)).startswith(entry)]
            if len(matches) != 1:
                break
            found += matches
        elif entry.startswith("MIG-"):
            try:
                found.append(nvml.nvmlDeviceGetHandleByUUID(entry))
            except nvml.NVMLError:
                break
        else:
            break
    return found


def resident_gib() -> float | None:
    """Resident memory of this process in GiB; None where the system has no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _sum(values: list[float]) -> float | None:
    return sum(values) if values else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
