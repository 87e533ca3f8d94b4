"""Merging beside mergekit, and beside what the disk costs.

    make bench-merge     (python tools/bench_merge.py --json docs/benchmarks/merge.json --gigabytes 1 4 12)

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
import from_checkout  # noqa: F401 - makes the project importable
import torch
import yaml

from copd_megatron.files import write_atomic
from copd_megatron.weights.hf import INDEX, HfFolder
from copd_megatron.weights.hf_shards import plan_shards
from copd_megatron.weights.page_cache import give_back, in_memory
from copd_megatron.weights.tensor_files import Form, TensorWriter

BRANCHES = 3
DENSITY = 0.2
SHARDS = 4
HIDDEN, INNER, VOCABULARY = 2048, 6144, 32768
METHODS = ("linear", "ties")
BUFFER = 2**20
COMPARED = 50_000_000
"""Elements of a comparison, the smallest tensors first: all of a small model, a part of a large one."""
MERGEKIT = (
    "from copd_megatron.policy.platform import declare_torchvision_schemas as declare; declare(); "
    "from mergekit.scripts.run_yaml import main; main()"
)
"""mergekit imports transformers' models, which ask for operators of torchvision that a CPU installation lacks."""


def forms(gigabytes: float) -> tuple[dict[str, Form], int]:
    """Tensors of a Llama of about so many gigabytes in bfloat16, and its layers."""
    layer = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (HIDDEN // 4, HIDDEN),
        "self_attn.v_proj.weight": (HIDDEN // 4, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
    }
    ends = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    size = sum(math.prod(shape) for shape in layer.values()) * 2
    layers = max(1, round((gigabytes * 1e9 - sum(math.prod(shape) for shape in ends.values()) * 2) / size))
    shapes = ends | {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {name: Form(torch.bfloat16, shape) for name, shape in shapes.items()}, layers


def make(folder: Path, gigabytes: float) -> list[Path]:
    """The base and its branches, as folders of `SHARDS` shards of random values."""
    tensors, layers = forms(gigabytes)
    total = sum(form.nbytes for form in tensors.values())
    shards = plan_shards(dict(sorted(tensors.items())), math.ceil(total / SHARDS))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    # Slices of long random rows: drawing every value anew would take longer than all merges.
    source = torch.Generator().manual_seed(0)
    period = 4 * BUFFER + 12_345
    origin = 0.02 * torch.randn(period, generator=source)
    rows = [origin] + [origin + 0.001 * torch.randn(period, generator=source) for _ in range(BRANCHES)]
    paths = [folder / name for name in ("base", *(f"branch{number}" for number in range(1, BRANCHES + 1)))]
    for path, row in zip(paths, rows, strict=True):
        path.mkdir(parents=True)
        values = torch.cat([row, row[:BUFFER]]).bfloat16()
        (path / "config.json").write_text(json.dumps(config))
        at = 0
        for shard in shards:
            writer = TensorWriter(path / shard.file, shard.forms)
            for name, form in shard.forms.items():
                for start in range(0, form.numel, BUFFER):
                    size = min(BUFFER, form.numel - start)
                    writer.write(name, start, values[at : at + size])
                    at = (at + size) % period
            writer.close()
        if len(shards) > 1:
            places = {name: shard.file for shard in shards for name in shard.forms}
            (path / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    return paths


def ours(method: str, paths: Sequence[Path], out: Path) -> list[str]:
    """The command of `copd merge`."""
    base, *branches = map(str, paths)
    options = ["--method", method, *(["--density", str(DENSITY)] if method == "ties" else [])]
    shard = math.ceil(sum(form.nbytes for form in forms_of(paths[0]).values()) / SHARDS / 1e6)
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
    shard = math.ceil(sum(form.numel for form in forms_of(paths[0]).values()) / SHARDS)
    return [sys.executable, "-c", MERGEKIT, str(file), str(out), "--no-copy-tokenizer", "--no-write-model-card",
            "--quiet", "--out-shard-size", str(shard), "--num-threads", str(os.cpu_count() or 1)]  # fmt: skip


def forms_of(folder: Path) -> dict[str, Form]:
    """Of a Hugging Face folder's tensors."""
    model = HfFolder(folder)
    return {name: Form(model.dtype(name), tuple(model.shape(name))) for name in model.names()}


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


def compare(method: str, paths: Sequence[Path], one: Path, other: Path) -> dict[str, float]:
    """SystemExit if two merged folders differ by more than a last place; how much was compared."""
    base, *branches = (HfFolder(path) for path in paths)
    mine, found = HfFolder(one), HfFolder(other)
    if mine.names() != found.names():
        raise SystemExit(f"bench_merge: {one} and {other} hold other tensors")
    compared = left_out = 0
    for name in sorted(mine.names(), key=lambda name: (math.prod(mine.shape(name)), name)):
        a, b = mine.tensor(name).float().view(-1), found.tensor(name).float().view(-1)
        if compared and compared + len(a) > COMPARED:
            break
        sources = [branch.tensor(name).float().view(-1) for branch in branches]
        decided = torch.ones(len(a), dtype=torch.bool)
        if method == "ties":
            start = base.tensor(name).float().view(-1)
            total = torch.zeros(len(a))
            size = torch.zeros(len(a))
            for source in sources:
                delta = source - start
                keep = max(1, int(DENSITY * len(delta)))
                threshold = delta.abs().kthvalue(len(delta) - keep + 1).values
                decided &= delta.abs() != threshold
                delta[delta.abs() < threshold] = 0.0
                total += delta
                size += delta.abs()
            decided &= (total.abs() > 1e-5 * size) | (size == 0)
            sources.append(start)
        largest = torch.stack([source.abs() for source in (b, *sources)]).amax(0).clamp(min=1e-30)
        wrong = ((a - b).abs() > torch.exp2(largest.log2().floor() - 7)) & decided
        if bool(wrong.any()):
            raise SystemExit(f"bench_merge: {method}: {int(wrong.sum())} of {len(a)} elements of {name} differ")
        compared += len(a)
        left_out += int((~decided).sum())
    return {"elements": compared, "left_out": left_out}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0], help="size of the branches together")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="leave the inputs in the page cache")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the result here")
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
    if given.json is not None:
        result = {
            "date": date.today().isoformat(),
            "machine": {"cpu": machine.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
            "torch": torch.__version__,
            "sizes": sizes,
        }
        write_atomic(given.json, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
