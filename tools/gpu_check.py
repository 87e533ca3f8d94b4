"""What one GPU does with the policy's layers: bf16, each FP8 recipe, packing, attention. One command, no network.

    python tools/gpu_check.py --out gpu_check.json [--layers 4] [--sequences 8 --length 1024]
    python tools/gpu_check.py --cpu-smoke           the same code on tiny sizes, without a GPU: its times mean nothing

The layers are those of a Qwen3-VL-4B (hidden 2560, 32 heads in 8 groups of 128, MLP 9728) around a small vocabulary,
built with the policy's own settings. Parts come in order: versions, the rate of bf16 matrix products, a linear layer
under each FP8 recipe against float32, training steps (tokens per second, share of the measured rate, peak memory,
distance of the losses from bf16 on the same data), packed against padded, our attention against Transformer Engine's.
Values are compared before anything is timed. Times are medians after warm-up, by CUDA events.

Runs from a checkout, installed or not; torch, transformers, megatron-core, safetensors and rich have to be there.
A part that cannot run is {"not_run": reason}; one that broke or computed something wrong has "broken": true as well,
and the command then ends with 1. Prints a short table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform as machine
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import from_checkout  # noqa: F401  (before anything of the project)
import torch
from rich.console import Console
from rich.table import Table

from copd_megatron.errors import ConfigError
from copd_megatron.files import write_atomic
from copd_megatron.policy import layout, platform

sys.path.insert(0, str(Path(__file__).parent))
from bench_model import Shape
from gpu_check_attention import attention_part, linear_part
from gpu_check_timing import NotRun, Sizes, matmul_rate
from gpu_check_training import Stack, packed_part, training_part

from copd_megatron.policy.fp8 import RECIPES

TINY = Sizes(
    shape=Shape(hidden=64, layers=2, heads=4, groups=2, head_dim=16, mlp=96, vocabulary=128),
    sequences=3,
    length=24,
    steps=8,
    warm_up=1,
    repeats=2,
    square=128,
)


def qwen3_4b(layers: int, vocabulary: int, sequences: int, length: int, steps: int) -> Sizes:
    """The sizes on a GPU; fewer layers than the model's 36 fit beside their optimizer."""
    shape = Shape(hidden=2560, layers=layers, heads=32, groups=8, head_dim=128, mlp=9728, vocabulary=vocabulary)
    return Sizes(shape, sequences, length, steps, warm_up=5, repeats=20, square=8192)


def facts() -> dict[str, Any]:
    """Versions of what is installed, and the GPU; None for what is not there."""
    names = ("torch", "megatron-core", "transformer-engine", "transformers", "triton")
    versions: dict[str, Any] = {name: _version(name) for name in names}
    found: dict[str, Any] = {**versions, "python": machine.python_version(), "cuda": torch.version.cuda}
    found.update(date=date.today().isoformat(), driver=_driver(), gpu=None, compute_capability=None, memory_gib=None)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found.update(
            gpu=properties.name,
            compute_capability=f"{properties.major}.{properties.minor}",
            memory_gib=properties.total_memory / 2**30,
            cudnn=torch.backends.cudnn.version(),
        )
    found["layers_from"] = "Transformer Engine" if platform.has_transformer_engine() else "megatron-core, local"
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
        pynvml.nvmlShutdown()
    except Exception:  # no driver is an answer; NVML's errors exist only where the import worked
        return None
    return driver.decode() if isinstance(driver, bytes) else str(driver)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` gives, or why it does not run; memory is free again afterwards."""
    try:
        return run()
    except (NotRun, ConfigError) as reason:
        return {"not_run": str(reason)}
    except Exception as error:  # a part that breaks must not take the others along
        lines = str(error).strip().splitlines() or [""]
        return {"not_run": f"{type(error).__name__}: {lines[0]}", "broken": True, "trace": traceback.format_exc()}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def check(sizes: Sizes, precisions: Sequence[str], kept: int) -> dict[str, Any]:
    """Every part, in order."""
    result: dict[str, Any] = {"facts": facts(), "sizes": _plain(sizes)}
    device = platform.device()
    result["matmul_bf16"] = attempt(lambda: matmul_rate(sizes, device))
    peak = result["matmul_bf16"].get("tflops")
    result["linear"] = {recipe: attempt(lambda r=recipe: linear_part(r, sizes, device)) for recipe in RECIPES}  # type: ignore[misc]
    result["linear"]["mxfp8"] = result_mxfp8 = {"not_run": _why_no_mxfp8()}
    training: dict[str, Any] = {}
    weights: dict[str, torch.Tensor] | None = None
    config: Any = None

    def first(params: str) -> dict[str, Any]:
        nonlocal weights, config
        part, stack = training_part(sizes, params, "none", peak, weights, None)
        weights, config = weights or stack.weights, stack.config
        return part

    for params in precisions:
        training[params] = attempt(lambda params=params: first(params))  # type: ignore[misc]
    expected = training["bf16"].get("losses")
    for recipe in RECIPES:
        training[recipe] = attempt(
            lambda recipe=recipe: training_part(sizes, "bf16", recipe, peak, weights, expected, kept)[0]  # type: ignore[misc]
        )
    training["mxfp8"] = result_mxfp8
    result["training"] = training
    result["packing"] = {params: attempt(lambda p=params: packed_part(sizes, p, weights)) for params in precisions}  # type: ignore[misc]
    result["attention"] = {
        which: attempt(lambda w=which: attention_part(sizes, device, config or _config(sizes), w))  # type: ignore[misc]
        for which in ("ours", "ours_responses", "transformer_engine")
    }
    return result


def _config(sizes: Sizes) -> Any:
    return Stack(sizes.shape, "bf16").config


def _why_no_mxfp8() -> str:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (10, 0):
        return "needs Blackwell (compute capability 10.0)"
    return "this GPU may have it, but precision.fp8 does not offer it"


def _plain(sizes: Sizes) -> dict[str, Any]:
    return {**vars(sizes), "shape": vars(sizes.shape)}


def parts_of(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, part) of everything that was measured or was not."""
    named = [("bf16 matrix product", result["matmul_bf16"])]
    for group in ("linear", "training", "packing", "attention"):
        named += [(f"{group}: {name}", part) for name, part in result[group].items()]
    return named


def table(result: dict[str, Any]) -> Table:
    """One line per part."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("part", "result"):
        shown.add_column(title, overflow="fold")
    for name, part in parts_of(result):
        shown.add_row(name, _line(part))
    return shown


def _line(part: dict[str, Any]) -> str:
    if "not_run" in part:
        return ("BROKEN: " if part.get("broken") else "not run: ") + part["not_run"]
    if "speedup" in part:
        rates = ", ".join(f"{name} {part[name]['real_tokens_per_second']:,.0f}" for name in ("packed", "padded"))
        return f"{rates} real tokens/s; {part['speedup']:.2f} times as fast packed"
    words = []
    if "relative_error" in part:
        words.append(f"largest relative error {max(part['relative_error'].values()):.1e}")
    if "tokens_per_second" in part:
        words.append(f"{part['tokens_per_second']:,.0f} tokens/s")
    if "milliseconds" in part:
        words.append(f"{part['milliseconds']:.2f} ms")
    if "tflops" in part:
        words.append(f"{part['tflops']:.1f} TFLOP/s")
    if part.get("mfu_of_measured_bf16") is not None:
        words.append(f"{100 * part['mfu_of_measured_bf16']:.1f} % of the measured bf16 rate")
    if part.get("peak_gib") is not None:
        words.append(f"peak {part['peak_gib']:.1f} GiB")
    if "losses" in part:
        words.append(f"loss {part['losses'][0]:.4f} to {part['losses'][-1]:.4f}")
    if "loss_difference" in part:
        words.append(f"loss − bf16: largest {part['loss_difference']['largest']:.4f}")
    return ", ".join(words)


def main() -> None:
    """Check, print, and end with 1 if a part broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="layers of the stack (default 4)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="default 8192: the layers are what is measured")
    parser.add_argument("--sequences", type=int, default=8, help="of a step (default 8)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence (default 1024)")
    parser.add_argument("--steps", type=int, default=50, help="updates that are compared with bf16 (default 50)")
    parser.add_argument("--bf16-layers", type=int, default=0, help="layers at each end that FP8 leaves out (default 0)")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes on the CPU, to try the script itself")
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    given = parser.parse_args()
    if not given.cpu_smoke and not torch.cuda.is_available():
        sys.exit(
            "gpu_check: torch finds no CUDA device; run it on a machine with an NVIDIA GPU, or try the script itself "
            "with --cpu-smoke"
        )
    sizes, precisions = TINY, ["bf16", "fp32"]
    if not given.cpu_smoke:
        sizes = qwen3_4b(given.layers, given.vocabulary, given.sequences, given.length, given.steps)
        precisions = ["bf16"]
    one = layout.Layout()
    layout.initialize(one)
    try:
        result = check(sizes, precisions, given.bf16_layers)
    finally:
        layout.shutdown()
    if given.out:
        write_atomic(given.out, json.dumps(result, indent=1) + "\n")
    console = Console(width=max(Console().width, 140))
    known = {name: value for name, value in result["facts"].items() if value is not None}
    console.print(", ".join(f"{name} {value}" for name, value in known.items()), highlight=False)
    console.print(table(result), highlight=False)
    print(json.dumps(result))
    broken = [name for name, part in parts_of(result) if part.get("broken")]
    if broken:
        sys.exit(f"gpu_check: {len(broken)} of {len(parts_of(result))} parts broke: {', '.join(broken)}")


if __name__ == "__main__":
    main()
