"""GPU telemetry, against a stand-in for NVML."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from copd_megatron.observe.gpu import GIB, GpuTelemetry, visible_handles


class NVMLError(Exception):
    """What NVML raises."""


class FakeNvml:
    """Three GPUs; a handle is its number. GPU 2 does not know its power."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != "MIG-7":
            raise NVMLError
        return uuid

    def nvmlDeviceGetUUID(self, gpu: int) -> bytes:
        return [b"GPU-aa1", b"GPU-aa2", b"GPU-b"][gpu]

    def nvmlDeviceGetName(self, gpu: int) -> str:
        return f"model {gpu}"

    def nvmlDeviceGetMemoryInfo(self, gpu: int) -> Any:
        return SimpleNamespace(used=(gpu + 1) * GIB)

    def nvmlDeviceGetUtilizationRates(self, gpu: int) -> Any:
        return SimpleNamespace(gpu=20 * (gpu + 1))

    def nvmlDeviceGetPowerUsage(self, gpu: int) -> int:
        if gpu == 2:
            raise NVMLError
        return 300_000

    def nvmlDeviceGetTemperature(self, gpu: int, _: int) -> int:
        return 50 + gpu


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_units_and_sums_over_gpus(nvml: FakeNvml) -> None:
    sample = GpuTelemetry(devices=[0, 1]).sample()
    assert sample.pop("rss_gib") > 0
    assert sample == pytest.approx(
        {"memory_gib": 2, "gpu/utilisation": 0.3, "gpu/power_watts": 600, "gpu/temperature_celsius": 51}
    )


def test_quantity_a_gpu_does_not_know_is_left_out(nvml: FakeNvml) -> None:
    sample = GpuTelemetry(devices=[2]).sample()
    assert "gpu/power_watts" not in sample
    assert sample["memory_gib"] == 3


def test_only_visible_gpus_count(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert GpuTelemetry().names() == ["model 2", "model 0"]
    assert GpuTelemetry(devices=[1]).names() == ["model 0"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("1, 2", [1, 2]),
        ("1,9,2", [1]),
        ("GPU-b,GPU-aa1", [2, 0]),
        ("GPU-aa", []),
        ("MIG-7,1", ["MIG-7", 1]),
        ("MIG-8,1", []),
    ],
)
def test_visible_devices_are_read_as_cuda_does(visible: str | None, expected: list[Any]) -> None:
    assert visible_handles(FakeNvml(), visible) == expected


def test_machine_without_driver_tells_its_host_memory_only(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise NVMLError("libnvidia-ml.so.1 not found")

    monkeypatch.setattr(nvml, "nvmlInit", missing)
    telemetry = GpuTelemetry()
    sample = telemetry.sample()
    assert list(sample) == ["rss_gib"]
    assert 0.005 < sample["rss_gib"] < 64
    assert telemetry.names() == []
    telemetry.close()
