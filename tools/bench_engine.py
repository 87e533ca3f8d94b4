"""The SGLang engine beside the embedded one: sampling, scoring, what travels over the wire, and the weights' hand-over.

    make bench-engine     (python tools/bench_engine.py --json docs/benchmarks/engine.json --doc docs/sglang.md)

Real servers run on this machine, and one process asks them. With the mini model both engines are first held to the same
greedy tokens, scores and weights; then

- rollouts and scored tokens per second with 1, 8 and 32 sequences at a time, for both engines.

With a random model of 117 million parameters and a vocabulary of 32,768:

- bytes of an answer per scored token, top-k as nested lists, flat lists and base64, with equal values;
- what the client adds: its time per answer beside the server's own (`e2e_latency`);
- what scores cost: a scored sequence beside the same one without scores (its prefill alone);
- a hand-over of weights beside a broadcast of the same bytes (gloo, two processes, one tensor).

Ratios compare medians of the same run; on a machine that is busy with other things they say little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import doc_table
import from_checkout  # noqa: F401 - makes the project importable
import torch
from bench_model import Shape, write_model

from copd_megatron.cluster.site import OneMachine
from copd_megatron.config.load import check
from copd_megatron.config.run import RunConfig
from copd_megatron.files import write_atomic
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.engine import EngineLost
from copd_megatron.rollout.sglang import background, wire
from copd_megatron.rollout.sglang.client import Limits, Server
from copd_megatron.rollout.sglang.endpoints import read_endpoints
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.rollout.sglang.fleet import Fleet
from copd_megatron.rollout.sglang.shared_memory import SharedMemory
from copd_megatron.rollout.types import Prompt, Sampling
from copd_megatron.run_folder import RunFolder
from copd_megatron.weights.hf import HfFolder

AT_ONCE = (1, 8, 32)
RESPONSE, TOP_K = 64, 64
WIDE = Shape(hidden=1024, layers=4, heads=16, groups=8, head_dim=64, mlp=3072, vocabulary=32_768)
FORMS = {
    "nested": {"return_flat_raw_top_logprobs": False, "return_flat_raw_top_logprobs_b64": False},
    "flat": {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": False},
    "compact": {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True},
}


@dataclass(frozen=True)
class Speed:
    """Both engines with so many sequences at a time."""

    at_once: int
    embedded_rollouts: float
    sglang_rollouts: float
    embedded_scored_tokens: float
    sglang_scored_tokens: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write what was asked for. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each kind; their median counts")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--doc", type=Path, help="page that gets the tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), options.repeats)
    result = {"date": date.today().isoformat(), "machine": machine.platform(), "cpus": os.cpu_count(), **result}
    text = tables(result)
    print(text)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.json, json.dumps(result, indent=2) + "\n")
    if options.doc:
        doc_table.put(options.doc, "engine", text)
    return 0


def measure(scratch: Path, repeats: int) -> dict[str, Any]:
    """Start the servers and take all measurements."""
    from copd_megatron.data.mini.model import build

    mini, wide = scratch / "mini", scratch / "wide"
    build(mini, seed=0)
    write_model(wide, WIDE)
    for file in mini.iterdir():  # its tokenizer and processor
        if not (wide / file.name).exists():
            shutil.copy(file, wide / file.name)
    with _served(mini) as (engine, _):
        embedded = EmbeddedEngine("text", mini)
        engine.update_weights(HfFolder(mini).tensors(), version=0)
        prompts = [_prompt(embedded, number) for number in range(max(AT_ONCE))]
        check_equality(engine, embedded, prompts)
        speed = [asdict(_speed(engine, embedded, prompts, count, repeats)) for count in AT_ONCE]
    with _served(wide) as (engine, server):
        weights = dict(HfFolder(wide).tensors())
        engine.update_weights(weights.items(), version=0)
        prompt = Prompt("bench", "text", tuple(range(100, 164)), "", "exact", "")
        return {"speed": speed, **_wire(server, engine, prompt, repeats), **_hand_over(engine, weights, repeats)}


@contextmanager
def _served(model: Path) -> Iterator[tuple[SGLangEngine, Server]]:
    """An engine on a server of `model`, and the server itself."""
    run = model.parent / f"run_{model.name}"
    config = check(
        {
            "base": str(model),
            "run_dir": str(run),
            "branches": [{"name": "text", "data": {"mini": {"modality": "text"}}}],
            "topology": "none",
            "precision": {"params": "fp32"},
            "rollout": {"engine": "sglang", "max_new_tokens": RESPONSE, "sglang": {"max_restarts": 0}},
            "data": {"max_prompt_tokens": 1024},
            "log": {"kl_to_base": False},
        },
        RunConfig,
        "the benchmark",
    )
    folder = RunFolder(config.run_dir)
    folder.path.mkdir()
    fleet = Fleet(config, folder, OneMachine(config, folder))
    fleet.start()
    try:
        endpoints = read_endpoints(folder.endpoints)["text"]
        engine = SGLangEngine("text", model, endpoints, SharedMemory(256 << 20))
        _wait(engine, fleet)
        server = Server(endpoints.urls[0], endpoints.key, Limits())
        yield engine, server
        background.run(server.close())
        engine.close()
    finally:
        fleet.stop()


def _wait(engine: SGLangEngine, fleet: Fleet) -> None:
    while True:
        try:
            return engine.wait(5.0)
        except EngineLost:
            fleet.watch()  # raises with the end of its log if it died


def check_equality(engine: SGLangEngine, embedded: EmbeddedEngine, prompts: Sequence[Prompt]) -> None:
    """SystemExit unless both engines give the same greedy tokens and scores."""
    greedy = Sampling(RESPONSE, (), temperature=0.0)
    ours, theirs = engine.generate(prompts[:8], greedy, 0), embedded.generate(prompts[:8], greedy, 0)
    if [rollout.token_ids for rollout in ours] != [rollout.token_ids for rollout in theirs]:
        raise SystemExit("the engines' greedy tokens differ")
    for one, other in zip(engine.score(ours, 4, 1.0), embedded.score(ours, 4, 1.0), strict=True):
        if not torch.allclose(one.logprobs, other.logprobs, atol=1e-4, rtol=0):
            raise SystemExit("the engines' scores differ")


def _prompt(engine: EmbeddedEngine, number: int) -> Prompt:
    ids = engine.tokenizer(f"{12345 * (number + 7)}")["input_ids"] * 4
    return Prompt(f"bench:{number}", "text", tuple(ids), "", "exact", "")


def _speed(
    engine: SGLangEngine, embedded: EmbeddedEngine, prompts: Sequence[Prompt], count: int, repeats: int
) -> Speed:
    sampling = Sampling(RESPONSE, ())
    rates: dict[str, list[float]] = {}
    for turn in range(repeats + 1):
        for name, one in (("embedded", embedded), ("sglang", engine)):
            rollouts, seconds = _timed(partial(one.generate, prompts[:count], sampling, turn))
            _, scoring = _timed(partial(one.score, rollouts, TOP_K, 1.0))
            if turn:  # the first is warm-up
                rates.setdefault(f"{name}_rollouts", []).append(count / seconds)
                rates.setdefault(f"{name}_scored_tokens", []).append(count * RESPONSE / scoring)
    return Speed(count, **{name: statistics.median(values) for name, values in rates.items()})


def _wire(server: Server, engine: SGLangEngine, prompt: Prompt, repeats: int) -> dict[str, Any]:
    """Bytes per scored token, what the client adds, what scores cost."""
    rollout = engine.generate([prompt], Sampling(RESPONSE, ()), seed=1)[0]
    tokens = wire.Tokens(1 << 30, None)
    body = wire.scoring_request(rollout, {}, TOP_K, tokens)
    sizes: dict[str, float] = {}
    for form, options in FORMS.items():
        server.received = 0
        background.run(server.post("/generate", {**body, **options}))
        sizes[form] = server.received / RESPONSE
    plain = {key: value for key, value in body.items() if key in ("input_ids", "sampling_params")}
    ours, servers, bare = [], [], []
    for _ in range(3 * repeats):
        background.run(server.post("/flush_cache"))
        reply, seconds = _timed(lambda: background.run(server.post("/generate", body)))
        ours.append(seconds)
        servers.append(reply["meta_info"]["e2e_latency"])
        background.run(server.post("/flush_cache"))
        bare.append(_timed(lambda: background.run(server.post("/generate", plain)))[1])
    return {
        "bytes_per_scored_token": sizes,
        "compact_to_nested": sizes["compact"] / sizes["nested"],
        "client_to_server_time": statistics.median(ours) / statistics.median(servers),
        "scored_to_prefill_time": statistics.median(ours) / statistics.median(bare),
    }


def _hand_over(engine: SGLangEngine, weights: dict[str, torch.Tensor], repeats: int) -> dict[str, Any]:
    seconds = []
    for version in range(1, repeats + 2):
        seconds.append(_timed(partial(engine.update_weights, weights.items(), version))[1])
    size = sum(tensor.nbytes for tensor in weights.values())
    broadcast = _broadcast_seconds(size, repeats)
    return {
        "hand_over_bytes": size,
        "hand_over_seconds": statistics.median(seconds[1:]),
        "broadcast_seconds": broadcast,
        "hand_over_to_broadcast": statistics.median(seconds[1:]) / broadcast,
    }


def _broadcast_seconds(size: int, repeats: int) -> float:
    """Seconds of a gloo broadcast of `size` bytes from one process to another."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds"
        processes.spawn(_broadcasting, args=(size, repeats, f"file://{folder}/store", out), nprocs=2)  # type: ignore[no-untyped-call]
        return float(out.read_text())


def _broadcasting(rank: int, size: int, repeats: int, store: str, out: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    tensor = torch.ones(size, dtype=torch.uint8)
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        begun = time.perf_counter()
        dist.broadcast(tensor, 0)
        dist.barrier()
        seconds.append(time.perf_counter() - begun)
    if rank == 0:
        out.write_text(str(statistics.median(seconds[1:])))
    dist.destroy_process_group()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begun


def tables(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [
        f"{result['date']}, {result['cpus']} CPU cores, {RESPONSE} tokens a response, top {TOP_K}:",
        "",
        "| sequences at a time | rollouts/s embedded | SGLang | scored tokens/s embedded | SGLang |",
        "|---:|---:|---:|---:|---:|",
    ]
    for speed in result["speed"]:
        lines.append(
            f"| {speed['at_once']} | {speed['embedded_rollouts']:.1f} | {speed['sglang_rollouts']:.1f} | "
            f"{speed['embedded_scored_tokens']:,.0f} | {speed['sglang_scored_tokens']:,.0f} |"
        )
    sizes = result["bytes_per_scored_token"]
    lines += [
        "",
        "| quantity | measured | target |",
        "|---|---:|---:|",
        f"| bytes per scored token: nested, flat, compact | {sizes['nested']:,.0f}, {sizes['flat']:,.0f}, "
        f"{sizes['compact']:,.0f} | |",
        f"| compact to nested | {result['compact_to_nested']:.2f} | ≤ 0.4 |",
        f"| our time to the server's own | {result['client_to_server_time']:.2f} | ≤ 1.1 |",
        f"| scored to prefill alone | {result['scored_to_prefill_time']:.2f} | |",
        f"| hand-over of {result['hand_over_bytes'] / 1e6:.1f} MB to its broadcast | "
        f"{result['hand_over_to_broadcast']:.1f} ({result['hand_over_seconds'] * 1000:.0f} ms to "
        f"{result['broadcast_seconds'] * 1000:.0f} ms) | ≤ 2 |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
