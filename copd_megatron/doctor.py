"""What this machine can run, and why not more: `copd doctor`.

Every check looks at one thing, never raises, and says what to do about what it finds. Heavy packages are imported
only when asked about.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from copd_megatron.policy import fp8

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30
ENOUGH_MEMORY_GIB = 4.0
ENOUGH_DISK_GIB = 5.0

Status = Literal["ok", "limited", "missing"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `limited`: works, with a restriction that `detail` states; `missing`: not available here."""

    what: str
    status: Status
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it."""

    name: str
    memory_gib: float
    capability: tuple[int, int]


def diagnose(folder: str | os.PathLike[str] = ".") -> list[Finding]:
    """Everything that decides what can be run from `folder`."""
    gpus, gpu_problem = find_gpus()
    return [
        _python(),
        _cores(),
        _memory(),
        _disk(Path(folder)),
        _gpu(gpus, gpu_problem),
        _torch(bool(gpus)),
        _torchvision(),
        _megatron(),
        _optimizer(bool(gpus)),
        _transformer_engine(bool(gpus)),
        *_fp8(gpus),
        _sglang(),
        _math_verify(),
    ]


def render(findings: list[Finding]) -> Table:
    """The findings as a table for the terminal."""
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "limited": "yellow", "missing": "red"}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "status", "found", "to change that"):
        table.add_column(title, overflow="fold")
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(Text(finding.what), status, Text(finding.detail), Text(finding.remedy))
    return table


def find_gpus() -> tuple[list[Gpu], str]:
    """The machine's GPUs by NVML, and why there are none."""
    nvml, problem = _load("pynvml")
    if nvml is None:
        return [], problem
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        return [], f"no NVIDIA driver ({error})"
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        gpus = [
            Gpu(
                name=nvml.nvmlDeviceGetName(handle),
                memory_gib=nvml.nvmlDeviceGetMemoryInfo(handle).total / GIB,
                capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in handles
        ]
        return gpus, "" if gpus else "a driver, but no GPU"
    except nvml.NVMLError as error:
        return [], f"the driver does not answer ({error})"
    finally:
        nvml.nvmlShutdown()


def _python() -> Finding:
    return Finding("Python", "ok", platform.python_version())


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Finding(
            "CPU cores", "limited", f"{cores}: branches take turns", "two cores run two branches side by side"
        )
    return Finding("CPU cores", "ok", str(cores))


def _memory() -> Finding:
    available = _available_memory_gib()
    if available is None:
        return Finding(
            "memory", "limited", "unknown: no /proc/meminfo", f"have at least {ENOUGH_MEMORY_GIB:g} GiB free"
        )
    if available < ENOUGH_MEMORY_GIB:
        remedy = f"the mini suite wants {ENOUGH_MEMORY_GIB:g} GiB"
        return Finding("memory", "limited", f"{available:.1f} GiB available", remedy)
    return Finding("memory", "ok", f"{available:.1f} GiB available")


def _available_memory_gib() -> float | None:
    """What the kernel, and the control group where there is a limit, still give."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            available = min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass
    return available / GIB


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / GIB
    detail = f"{free:.1f} GiB free in {folder.resolve()}"
    if free < ENOUGH_DISK_GIB:
        return Finding(
            "disk", "limited", detail, "free some space: checkpoints are kept beside each other while written"
        )
    return Finding("disk", "ok", detail)


def _gpu(gpus: list[Gpu], problem: str) -> Finding:
    if not gpus:
        return Finding("GPU", "missing", f"{problem}: the mini suite runs, on CPU", "a machine with NVIDIA GPUs")
    kinds = Counter((gpu.name, round(gpu.memory_gib)) for gpu in gpus)
    return Finding("GPU", "ok", ", ".join(f"{count} × {name}, {memory} GiB" for (name, memory), count in kinds.items()))


def _torch(has_gpu: bool) -> Finding:
    torch, problem = _load("torch")
    if torch is None:
        return Finding("torch", "missing", problem, "make env")
    build = f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only")
    if has_gpu and not torch.cuda.is_available():
        remedy = "install the build of torch that fits the driver (pytorch.org)"
        return Finding("torch", "limited", f"{build}: cannot use the GPU", remedy)
    return Finding("torch", "ok", build)


def _torchvision() -> Finding:
    version = _version("torchvision")
    if version is None:
        remedy = "make env, or: pip install --no-deps torchvision"
        return Finding("torchvision", "missing", "not installed: image processors need it", remedy)
    if _load("torch")[0] is None:
        return Finding("torchvision", "limited", f"{version}: not checked without torch", "make env")
    from copd_megatron.policy.platform import declare_torchvision_schemas

    declare_torchvision_schemas()
    extension, problem = _load("torchvision.extension")
    if extension is None:
        return Finding("torchvision", "missing", problem, "install the version that belongs to this torch")
    if not extension._has_ops():
        detail = f"{version}: its compiled extension does not fit this torch; none of it is used"
        return Finding("torchvision", "limited", detail, "nothing to do")
    return Finding("torchvision", "ok", version)


def _megatron() -> Finding:
    version = _version("megatron-core")
    if version is None:
        return Finding("megatron-core", "missing", "not installed", "make env")
    major, minor = map(int, re.findall(r"\d+", version)[:2])
    if not (0, 16) <= (major, minor) < (0, 20):
        remedy = "pip install 'megatron-core>=0.16.1,<0.20'"
        return Finding("megatron-core", "limited", f"{version}: the project was not tried with it", remedy)
    return Finding("megatron-core", "ok", version)


def optimizer_of_megatron() -> str:
    """Where megatron-core takes Adam from: the first that can be imported, as in `megatron.core.optimizer`."""
    _load("torch")  # first: Transformer Engine finds its libraries through it
    for module in ("transformer_engine.pytorch.optimizers", "apex.optimizers"):
        if _load(module)[0] is not None:
            return module
    return "torch.optim"


def _optimizer(has_gpu: bool) -> Finding:
    names = {
        "transformer_engine.pytorch.optimizers": "Transformer Engine's FusedAdam",
        "apex.optimizers": "Apex's FusedAdam",
        "torch.optim": "torch's AdamW, fused",
    }
    origin = optimizer_of_megatron()
    if has_gpu and origin == "torch.optim":
        remedy = "pip install -e '.[gpu]' (Transformer Engine's FusedAdam)"
        return Finding("optimizer", "limited", f"{names[origin]}: one call per parameter group", remedy)
    return Finding("optimizer", "ok", names[origin])


def _transformer_engine(has_gpu: bool) -> Finding:
    what, version = "Transformer Engine", _version("transformer-engine")
    if version is None:
        if has_gpu:
            detail = "not installed: plain attention, no FP8"
            return Finding(what, "missing", detail, "pip install -e '.[gpu]'")
        return Finding(what, "missing", "not installed: only of use on a GPU")
    _load("torch")
    module, problem = _load("transformer_engine.pytorch")
    if module is None:
        return Finding(what, "limited", f"{version}: {problem}", "pip install --force-reinstall -e '.[gpu]'")
    return Finding(what, "ok", version)


def _fp8(gpus: list[Gpu]) -> list[Finding]:
    """One finding per recipe where there is a GPU; the weakest of the GPUs decides."""
    if not gpus:
        return [Finding("FP8", "missing", "no GPU: training is in float32 or bfloat16")]
    torch, problem = _load("torch")
    if torch is None:
        return [Finding("FP8", "missing", f"not checked: {problem}", "make env")]
    machine = fp8.Machine(
        capability=min(gpu.capability for gpu in gpus),
        engine=fp8.transformer_engine(load=True),
        cuda=fp8.major_minor(torch.version.cuda) if torch.version.cuda else None,
    )
    return [_fp8_recipe(recipe, machine, gpus) for recipe in fp8.RECIPES]


def _fp8_recipe(recipe: fp8.Recipe, machine: fp8.Machine, gpus: list[Gpu]) -> Finding:
    what, needs, problem = f"FP8 {recipe}", fp8.NEEDS[recipe], fp8.why_not(recipe, machine)
    if problem is None:
        return Finding(what, "ok", f"usable: precision.fp8={recipe}")
    weak = sorted({gpu.name for gpu in gpus if gpu.capability < needs.capability})
    if weak:
        wanted = "{}.{}".format(*needs.capability)
        return Finding(what, "missing", f"{', '.join(weak)}: {problem}", f"GPUs of compute capability {wanted} or more")
    cuda = "{}.{}".format(*needs.cuda)
    return Finding(what, "missing", problem, f"pip install -e '.[gpu]', with a torch for CUDA {cuda} or newer")


def _sglang() -> Finding:
    version = _version("sglang")
    if version is None:
        remedy = "pip install -e '.[serve]' on a GPU host, `make env` on a CPU"
        return Finding("sglang", "missing", "not installed: the embedded engine is used", remedy)
    return Finding("sglang", "ok", version)


def _math_verify() -> Finding:
    version = _version("math-verify")
    if version is None:
        return Finding("math-verify", "missing", "not installed: the verifier `math` cannot be used", "make env")
    return Finding("math-verify", "ok", version)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _load(module: str) -> tuple[ModuleType | None, str]:
    """Import `module`, or say in one line why that fails. A broken installation can raise anything."""
    try:
        return importlib.import_module(module), ""
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed"
    except Exception as error:
        reason = str(error).strip().splitlines() or ["no reason given"]
        return None, f"{module} does not load ({type(error).__name__}: {reason[-1]})"
