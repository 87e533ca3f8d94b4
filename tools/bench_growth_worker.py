"""One process of one case of `tools/bench_growth.py`: times updates of the policy and prints what it saw as JSON.

Started with torchrun's environment and one argument, the case as JSON (`Case`). ConfigError of a layout that the model
or the machine does not allow is an answer too: {"skipped": reason}.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

MIB = 2**20
WARM_UP = 2
KINDS = {
    "communication": ("gloo:", "nccl"),
    "attention": ("scaled_dot_product", "flash", "fmha", "aten::bmm", "aten::baddbmm"),
    "matrix products": ("aten::mm", "aten::addmm", "gemm", "nvjet"),
}
"""What an operator's or a GPU kernel's name begins with or contains; batched products only occur in attention."""
REST = "rest"


@dataclass(frozen=True)
class Case:
    """`sequences` of `length` tokens per process and update, packed to micro-batches of `tokens_per_microbatch`.
    `layout` are the degrees of `Layout`; `folder` holds the model, whose vocabulary is `vocabulary`."""

    folder: str
    vocabulary: int
    sequences: int
    length: int
    tokens_per_microbatch: int
    steps: int
    precision: str = "fp32"
    layout: dict[str, int] = field(default_factory=dict)

    @property
    def world(self) -> int:
        """Processes."""
        return self.layout.get("world", 1)

    def text(self) -> str:
        """As the worker's argument."""
        return json.dumps(asdict(self))


def resident_peak_mib(reset: bool = False) -> float:
    """Largest resident memory of this process so far, since the last reset where the kernel allows one."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(case: Case) -> dict[str, Any]:
    """Loss and gradient norm of a first update that is the same for every layout, then seconds, memory and the split
    of one profiled update."""
    import torch
    import torch.distributed as dist
    from bench_model import cross_entropy, make_samples

    from copd_megatron.policy import layout, platform
    from copd_megatron.policy.optimizer import OptimizerSettings
    from copd_megatron.policy.trainer import Policy

    torch.set_num_threads(1)
    degrees = layout.Layout(**case.layout)  # type: ignore[arg-type]
    layout.initialize(degrees)
    before = resident_peak_mib(reset=True)
    policy = Policy(case.folder, degrees, OptimizerSettings(lr=1e-5), case.precision, case.tokens_per_microbatch)  # type: ignore[arg-type]
    replica, replicas = layout.data_parallel_rank(), layout.data_parallel_size()

    same = make_samples(4, min(case.length, 128), case.vocabulary, seed=1)
    first = policy.update(same[replica::replicas], cross_entropy)
    share = make_samples(case.sequences * case.world, case.length, case.vocabulary, seed=2)[replica::replicas]

    def step() -> float:
        dist.barrier()
        start = time.perf_counter()
        policy.update(share, cross_entropy)
        if platform.on_gpu():
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter() - start

    for _ in range(WARM_UP):
        step()
    resident_peak_mib(reset=True)
    if platform.on_gpu():
        torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(case.steps)]
    on_gpu = platform.on_gpu()
    result = {
        "loss": first["loss"],
        "grad_norm": first["grad_norm"],
        "seconds": seconds,
        "tokens_per_second_per_process": case.sequences * case.length / statistics.median(seconds),
        "peak_mib": torch.cuda.max_memory_allocated() / MIB if on_gpu else resident_peak_mib(),
        "memory": "CUDA, allocated" if on_gpu else "resident",
        "before_model_mib": 0.0 if on_gpu else before,
        "split": time_split(step),
    }
    layout.shutdown()
    return result


def time_split(step: Any) -> dict[str, float]:
    """Shares of one profiled update by the operators' own time (on a GPU: the kernels').

    `communication` is the time that transfers were under way, waiting for peers included; nothing else runs meanwhile
    with gloo. `rest` is what is left: operators element by element, the optimizer, Python.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from copd_megatron.policy import platform

    on_gpu = platform.on_gpu()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        seconds = step()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        if kind == REST or (event.device_type == DeviceType.CUDA) != on_gpu:
            continue
        # A transfer of gloo's runs beside the operators and has no time of its own in them.
        of_cpu = event.cpu_time_total if kind == "communication" else event.self_cpu_time_total
        spent[kind] += float(event.self_device_time_total if on_gpu else of_cpu) / 1e6
    shares = {kind: min(1.0, total / seconds) for kind, total in spent.items()}
    return {**shares, REST: max(0.0, 1.0 - sum(shares.values()))}


def kind_of(operator: str) -> str:
    """Which of the kinds an operator or kernel is; waiting for the others between updates is none."""
    if "barrier" in operator:
        return REST
    return next((kind for kind, marks in KINDS.items() if any(mark in operator for mark in marks)), REST)


def main() -> None:
    """Measure the case and print one line of JSON last."""
    from copd_megatron.errors import ConfigError

    case = Case(**json.loads(sys.argv[1]))
    try:
        result = measure(case)
    except ConfigError as error:
        result = {"skipped": str(error)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
