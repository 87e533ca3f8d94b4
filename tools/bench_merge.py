"""Merging beside mergekit, and beside what the disk costs.

    make bench-merge     (python tools/bench_merge.py --gigabytes 1 4 12 --json docs/benchmarks/merge.json
                                                      --doc docs/performance.md)

Per size and method: branches of one base are made on the spot (bfloat16, in shards), merged by `copd merge` and by
`mergekit-yaml` in processes of their own, turn and turn about, and their results compared. The best of `--repeats` runs
is taken: wall time from start to end of the process, Python's start included, and peak resident memory. The disk's cost
is the time to read the inputs (and, for `ties`, the base) and to write as much as the output with plain preadv and
pwrite, an fsync at the end; merging forces its output to disk too, mergekit does not.

Before each run everything is on disk and the inputs are out of the page cache, so that all read them from the disk;
`--warm` leaves them in memory as far as they fit. CPU seconds (user and system, of all threads) tell more than wall
time where others use the machine.

The comparison allows one last place of bfloat16. For `ties` it leaves out what float32 cannot decide: changes as large
as the threshold, of which methods keep different ones, and signs of sums that cancel out to rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform as machine
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import doc_table
import from_checkout  # noqa: F401 - makes the project importable
import torch
import yaml
from bench_merge_models import BRANCHES, BUFFER, DENSITY, SHARDS, compare, make

from copd_megatron.files import write_atomic
from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.hf_shards import forms_of
from copd_megatron.weights.page_cache import give_back, in_memory

METHODS = ("linear", "ties")
MERGEKIT = (
    "from copd_megatron.policy.platform import declare_torchvision_schemas as declare; declare(); "
    "from mergekit.scripts.run_yaml import main; main()"
)
"""mergekit imports transformers' models, which ask for operators of torchvision that a CPU installation lacks."""


def ours(method: str, paths: Sequence[Path], out: Path) -> list[str]:
    """The command of `copd merge`."""
    base, *branches = map(str, paths)
    options = ["--method", method, *(["--density", str(DENSITY)] if method == "ties" else [])]
    shard = math.ceil(sum(form.nbytes for form in forms_of(HfFolder(paths[0])).values()) / SHARDS / 1e6)
    return [sys.executable, "-m", "copd_megatron.cli", "merge", *branches, "--base", base, "-o", str(out), *options,
            "--shard-megabytes", str(shard)]  # fmt: skip


def theirs(method: str, paths: Sequence[Path], out: Path) -> list[str]:
    """The command of mergekit, which is given the same inputs, weights, density and arithmetic in float32."""
    own: dict[str, float] = {"weight": 1 / BRANCHES, **({"density": DENSITY} if method == "ties" else {})}
    description: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(path), "parameters": own} for path in paths[1:]],
        "parameters": {"normalize": True},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    if method == "ties":
        description["base_model"] = str(paths[0])
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(description))
    shard = math.ceil(sum(form.numel for form in forms_of(HfFolder(paths[0])).values()) / SHARDS)
    return [sys.executable, "-c", MERGEKIT, str(file), str(out), "--no-copy-tokenizer", "--no-write-model-card",
            "--quiet", "--out-shard-size", str(shard), "--num-threads", str(os.cpu_count() or 1)]  # fmt: skip


def run(command: Sequence[str], out: Path) -> dict[str, float]:
    """Seconds, CPU seconds and peak resident MiB of a command; SystemExit with its last words if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    spent = _cpu_of_children()
    threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as words:
        began = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **threads}, stdout=words, stderr=words)
        peak = 0
        while process.poll() is None:
            # Not the rusage of the child: that begins with the memory of this process, of which the child is a copy.
            peak = max(peak, _peak_kib(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.returncode:
            words.seek(0)
            raise SystemExit(f"bench_merge: {' '.join(command[:4])} … failed:\n{words.read()[-2000:]}")
    return {"seconds": seconds, "cpu": _cpu_of_children() - spent, "peak_mib": peak / 1024}


def _cpu_of_children() -> float:
    """User and system seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _peak_kib(pid: int) -> int:
    """The largest resident memory that a process has had so far (Linux); 0 when it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def let_go(paths: Sequence[Path], warm: bool) -> float:
    """Have everything on disk, and unless `warm` the weights of `paths` out of the page cache; the share that stays."""
    os.sync()
    shares = []
    for file in (file for path in paths for file in sorted(path.glob("*.safetensors"))):
        handle = os.open(file, os.O_RDONLY)
        if not warm:
            give_back(handle, 0, os.fstat(handle).st_size)
        shares.append(in_memory(handle))
        os.close(handle)
    return sum(shares) / len(shares)


def disk(paths: Sequence[Path], out: Path) -> dict[str, float]:
    """Seconds and CPU seconds to read all weights of `paths` and to write as many bytes as one of them has."""
    spent = time.process_time()
    buffer = memoryview(bytearray(BUFFER))
    began = time.perf_counter()
    for path in paths:
        for file in sorted(path.glob("*.safetensors")):
            handle = os.open(file, os.O_RDONLY)
            size = os.fstat(handle).st_size
            for start in range(0, size, BUFFER):
                os.preadv(handle, [buffer], start)
            os.close(handle)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for file in sorted(paths[0].glob("*.safetensors")):
        handle = os.open(out / file.name, os.O_WRONLY | os.O_CREAT)
        size = file.stat().st_size
        for start in range(0, size, BUFFER):
            os.pwrite(handle, buffer[: min(BUFFER, size - start)], start)
        os.fsync(handle)
        os.close(handle)
    return {"seconds": time.perf_counter() - began, "cpu": time.process_time() - spent}


def bench(method: str, paths: Sequence[Path], folder: Path, repeats: int, warm: bool) -> dict[str, Any]:
    """Times, memory and ratios of one method."""
    outs = {"copd": folder / "copd", "mergekit": folder / "mergekit"}
    commands = {"copd": ours(method, paths, outs["copd"]), "mergekit": theirs(method, paths, outs["mergekit"])}
    runs: dict[str, list[dict[str, float]]] = {"copd": [], "mergekit": [], "disk": []}
    in_cache = equality = None
    for _ in range(repeats):
        for who, command in commands.items():
            in_cache = max(in_cache or 0.0, let_go(paths, warm))
            runs[who].append(run(command, outs[who]))
        equality = equality or compare(method, paths, outs["copd"], outs["mergekit"])
        for out in outs.values():
            shutil.rmtree(out)
        let_go(paths, warm)
        runs["disk"].append(disk(paths if method == "ties" else paths[1:], folder / "plain"))
        shutil.rmtree(folder / "plain")
    best = {
        who: {"seconds": min(one["seconds"] for one in results), "cpu": min(one["cpu"] for one in results)}
        for who, results in runs.items()
    }
    peaks = {who: max(one["peak_mib"] for one in runs[who]) for who in commands}
    seconds = {who: facts["seconds"] for who, facts in best.items()}
    result = {
        "method": method,
        "compared": equality,
        "in_page_cache_before": in_cache,
        "seconds": seconds,
        "cpu_seconds": {who: facts["cpu"] for who, facts in best.items()},
        "peak_mib": peaks,
        "of_mergekit": seconds["copd"] / seconds["mergekit"],
        "of_disk": seconds["copd"] / seconds["disk"],
        "runs": runs,
    }
    words = [f"{who} {facts['seconds']:.1f} s (CPU {facts['cpu']:.1f} s)" for who, facts in best.items()]
    print(
        f"{method}: {', '.join(words)}; memory {peaks['copd']:.0f} MiB, mergekit {peaks['mergekit']:.0f} MiB; "
        f"{result['of_mergekit']:.2f} of mergekit, {result['of_disk']:.2f} of the disk",
        flush=True,
    )
    return result


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    facts = result["machine"]
    state = "left in the page cache" if any(size["warm"] for size in result["sizes"]) else "read from the disk"
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load']:.1f} at the end; torch {result['torch']}; "
        f"{result['date']}. Inputs {state}; best of {result['repeats']}. Seconds are wall time / CPU time.",
        "",
        "| three branches of | method | ours, s | mergekit, s | disk, s | of mergekit | of the disk "
        "| our memory, MiB | mergekit's |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in result["sizes"]:
        for row in size["methods"]:
            times = (
                f"{row['seconds'][who]:.1f} / {row['cpu_seconds'][who]:.1f}" for who in ("copd", "mergekit", "disk")
            )
            memory = (f"{row['peak_mib'][who]:,.0f}" for who in ("copd", "mergekit"))
            ratios = (f"{row[of]:.2f}" for of in ("of_mergekit", "of_disk"))
            cells = (f"{size['gigabytes'] / size['branches']:.2f} GB", row["method"], *times, *ratios, *memory)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0], help="size of the branches together")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="leave the inputs in the page cache")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--doc", type=Path, help="write the table here, between the markers")
    given = parser.parse_args()
    sizes = []
    for total in given.gigabytes:
        gigabytes = total / BRANCHES
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            needed = gigabytes * 1e9 * (BRANCHES + 1 + 3)
            if (free := shutil.disk_usage(name).free) < needed:
                raise SystemExit(f"bench_merge: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
            paths = make(Path(name), gigabytes)
            print(f"{BRANCHES} branches of {gigabytes:.3g} GB", flush=True)
            methods = [bench(method, paths, Path(name), given.repeats, given.warm) for method in given.methods]
            sizes.append({"gigabytes": total, "branches": BRANCHES, "warm": given.warm, "methods": methods})
    result = {
        "date": date.today().isoformat(),
        "machine": {"cpu": machine.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "torch": torch.__version__,
        "repeats": given.repeats,
        "sizes": sizes,
    }
    print(f"\n{table(result)}")
    if given.json is not None:
        write_atomic(given.json, json.dumps(result, indent=1) + "\n")
    if given.doc is not None:
        doc_table.put(given.doc, "merge", table(result))


if __name__ == "__main__":
    main()
