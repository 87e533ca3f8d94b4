"""The doctor reports what is there, survives what is broken and says what to do."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from copd_megatron import doctor
from copd_megatron.doctor import Finding, Gpu, diagnose, optimizer_of_megatron, render

HOPPER = Gpu("NVIDIA H200", 140.0, (9, 0))
ADA = Gpu("NVIDIA L4", 22.0, (8, 9))
AMPERE = Gpu("NVIDIA A100", 80.0, (8, 0))


def _finding(what: str, **arguments: str) -> Finding:
    return next(finding for finding in diagnose(**arguments) if finding.what == what)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages that comes first."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def _install(folder: Path, distribution: str, module: str = "", code: str = "", version: str = "9.9") -> None:
    information = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    if module:
        file = folder / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True)
        (file.parent / "__init__.py").touch()
        file.write_text(code)


def test_importing_the_doctor_loads_nothing_heavy() -> None:
    code = "import sys, copd_megatron.doctor; print([m for m in ('torch', 'rich', 'pynvml') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_every_question_is_answered_once() -> None:
    names = [finding.what for finding in diagnose()]
    assert sorted(names) == sorted(set(names))
    assert {"torch", "CPU cores", "memory", "GPU", "megatron-core", "optimizer", "Transformer Engine", "FP8"} <= set(
        names
    )
    assert {"sglang", "math-verify", "disk", "torchvision", "Python"} <= set(names)


def test_this_environment_has_what_the_project_requires() -> None:
    assert _finding("torch").status == "ok"
    assert _finding("megatron-core").detail == metadata.version("megatron-core")
    assert _finding("math-verify").detail == metadata.version("math-verify")


def test_optimizer_is_the_one_megatron_takes() -> None:
    from copd_megatron.policy.platform import prepare

    prepare()
    from megatron.core.optimizer import Adam

    assert Adam.__module__.startswith(optimizer_of_megatron())


def test_apex_is_found_where_transformer_engine_is_not(packages: Path) -> None:
    _install(packages, "apex", "apex.optimizers")
    assert optimizer_of_megatron() == "apex.optimizers"
    assert _finding("optimizer").detail == "Apex's FusedAdam"
    sys.modules.pop("apex.optimizers")
    sys.modules.pop("apex")


def test_adam_of_transformer_engine_comes_first(packages: Path) -> None:
    _install(packages, "apex", "apex.optimizers")
    package = packages / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    for file in (package.parent / "__init__.py", package / "__init__.py", package / "optimizers.py"):
        file.touch()
    assert _finding("optimizer").detail == "Transformer Engine's FusedAdam"
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "transformer_engine")]:
        sys.modules.pop(name)


def test_absent_packages_are_missing_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    for what in ("megatron-core", "sglang", "math-verify", "torchvision"):
        finding = _finding(what)
        assert finding.status == "missing"
        assert "install" in finding.remedy or "make env" in finding.remedy


def test_package_that_does_not_load_is_limited_with_the_reason(packages: Path) -> None:
    _install(
        packages, "transformer-engine", "transformer_engine.pytorch", "raise OSError('x\\nlibcudart.so.13 not found')"
    )
    finding = _finding("Transformer Engine")
    assert finding.status == "limited"
    assert finding.detail == "9.9: transformer_engine.pytorch does not load (OSError: libcudart.so.13 not found)"
    sys.modules.pop("transformer_engine")


@pytest.mark.parametrize(("version", "status"), [("0.15.3", "limited"), ("0.19.2rc1", "ok"), ("0.20.0", "limited")])
def test_untried_versions_of_megatron_are_limited(packages: Path, version: str, status: str) -> None:
    _install(packages, "megatron-core", version=version)
    assert _finding("megatron-core").status == status


def _fp8_findings() -> dict[str, Finding]:
    return {finding.what: finding for finding in diagnose() if finding.what.startswith("FP8")}


@pytest.mark.parametrize(
    ("gpus", "usable", "named"),
    [
        ([HOPPER, HOPPER], {"tensorwise", "delayed", "blockwise"}, ""),
        ([HOPPER, ADA], {"tensorwise", "delayed"}, "NVIDIA L4: compute capability is 8.9, 9.0 is needed"),
        ([HOPPER, AMPERE, ADA], set(), "NVIDIA A100"),
    ],
)
def test_each_fp8_recipe_needs_every_gpu_to_have_it(
    monkeypatch: pytest.MonkeyPatch, gpus: list[Gpu], usable: set[str], named: str
) -> None:
    import torch

    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpus, ""))
    monkeypatch.setattr(doctor.fp8, "transformer_engine", lambda load: (2, 20))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    findings = _fp8_findings()
    assert set(findings) == {"FP8 tensorwise", "FP8 delayed", "FP8 blockwise"}
    assert {what.split()[1] for what, finding in findings.items() if finding.status == "ok"} == usable
    assert named in findings["FP8 blockwise"].detail
    assert _finding("GPU").status == "ok"


def test_what_a_gpu_machine_lacks_for_fp8_is_said_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(doctor, "find_gpus", lambda: ([HOPPER], ""))
    monkeypatch.setattr(doctor.fp8, "transformer_engine", lambda load: "Transformer Engine is not installed")
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    finding = _fp8_findings()["FP8 blockwise"]
    assert finding.status == "missing"
    assert finding.detail == ("Transformer Engine is not installed; torch is built for CUDA 12.6, 12.9 is needed")
    assert "[gpu]" in finding.remedy
    assert "12.9" in finding.remedy


def test_without_gpu_one_line_says_that_there_is_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpus", lambda: ([], "no NVIDIA driver"))
    assert [(what, finding.status) for what, finding in _fp8_findings().items()] == [("FP8", "missing")]
    assert _finding("GPU").status == "missing"


def test_gpus_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_gpus", lambda: ([HOPPER, AMPERE, HOPPER], ""))
    assert _finding("GPU").detail == "2 × NVIDIA H200, 140 GiB, 1 × NVIDIA A100, 80 GiB"


def test_gpus_are_read_from_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    driver = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: closed.append(True),
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: "NVIDIA H200",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=140 * 2**30),
        nvmlDeviceGetCudaComputeCapability=lambda handle: [9, 0],
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    assert doctor.find_gpus() == ([HOPPER], "")
    assert closed == [True]


def test_machine_without_driver_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=RuntimeError, nvmlInit=no_driver))
    assert doctor.find_gpus() == ([], "no NVIDIA driver (NVML Shared Library Not Found)")


def test_unused_gpu_is_no_silent_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "find_gpus", lambda: ([HOPPER], ""))
    assert _finding("torch").status == "limited"
    assert "cannot use the GPU" in _finding("torch").detail
    assert "fused" in _finding("optimizer").detail


def test_scarce_memory_disk_and_cores_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_available_memory_gib", lambda: 1.5)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda process: {0})
    assert _finding("memory").status == "limited"
    assert _finding("CPU cores").status == "limited"
    disk = _finding("disk", folder=str(tmp_path))
    assert disk.status == "limited"
    assert disk.detail == f"1.0 GiB free in {tmp_path}"


def test_table_shows_remedies_letter_by_letter() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(render([Finding("sglang", "missing", "not installed", "pip install -e '.[serve]'")]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "pip install -e '.[serve]'" in shown
    assert "missing" in shown
