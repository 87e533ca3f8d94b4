"""The models of `tools/bench_merge.py`: made on the spot, and compared when they are merged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from copd_megatron.weights.hf import HfFolder
from copd_megatron.weights.hf_shards import name_shards, plan_shards
from copd_megatron.weights.tensor_files import Form, TensorWriter

BRANCHES = 3
DENSITY = 0.2
SHARDS = 4
HIDDEN, INNER, VOCABULARY = 2048, 6144, 32768
BUFFER = 2**20
"""Elements written, or bytes read, at once."""
COMPARED = 50_000_000
"""Elements of a comparison, the smallest tensors first: all of a small model, a part of a large one."""


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
        name_shards(path, shards)
    return paths


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
