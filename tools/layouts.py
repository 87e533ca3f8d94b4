"""Compare every parallel layout with one process: the same weights, samples and updates.

    make layouts        (python tools/layouts.py; --rows TP2 CP2 for some, --work DIR to keep the files)

Per row a gang of processes computes the log-probabilities of all responses, the gradient of one GRPO + OPD update on
text and image samples, and three updates. Log-probabilities must agree to 1e-5 (absolute), gradients to 1e-4 (relative
to each tensor's norm) and weights after three updates to 1e-4 (absolute), in float32. Dense rows are run with tied and
with untied embeddings. Ends with status 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
import launch

if TYPE_CHECKING:
    import torch

    from copd_megatron.policy.batching import Sample

TOLERANCES = {"logprobs": 1e-5, "gradients": 1e-4, "weights": 1e-4}
VOCAB, START, END, IMAGE, VIDEO, PATCH, MERGE = 53, 48, 49, 50, 51, 4, 2
MODELS = {"dense": ("tied", "untied"), "moe": ("moe",)}
UPDATES, GROUP, TOP_K = 3, 3, 6
TIMEOUT = 300.0
"""Seconds after which a gang counts as stuck."""


@dataclass(frozen=True)
class Row:
    """One line of the table: degrees as in `branches[].parallel`, settings of the policy, and the kind of model."""

    degrees: dict[str, Any]
    model: str = "dense"
    optimizer: dict[str, Any] | None = None
    recompute: Literal["none", "selective", "full"] = "none"

    @property
    def world(self) -> int:
        return int(self.degrees.get("world", 1))


ROWS = {
    "one process": Row({}),
    "selective recompute": Row({}, recompute="selective"),
    "full recompute": Row({}, recompute="full"),
    "TP2": Row({"world": 2, "tp": 2}),
    "TP2+SP": Row({"world": 2, "tp": 2, "sequence_parallel": True}),
    "PP2": Row({"world": 2, "pp": 2}),
    "PP2 x VPP2": Row({"world": 2, "pp": 2, "vpp": 2}),
    "CP2": Row({"world": 2, "cp": 2}),
    "DP2": Row({"world": 2}),
    "DP2 distributed optimizer": Row({"world": 2}, optimizer={"distributed": True}),
    "DP2 overlapped": Row(
        {"world": 2}, optimizer={"distributed": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
    ),
    "TP2 x PP2+SP": Row({"world": 4, "tp": 2, "pp": 2, "sequence_parallel": True}),
    "TP2 x CP2": Row({"world": 4, "tp": 2, "cp": 2}),
    "one process, MoE": Row({}, "moe"),
    "EP2": Row({"world": 2, "ep": 2}, "moe"),
    "TP2 x EP2": Row({"world": 4, "tp": 2, "ep": 2, "sequence_parallel": True}, "moe"),
    "TP2 x EP2, ETP1": Row({"world": 2, "tp": 2, "ep": 2, "etp": 1, "sequence_parallel": True}, "moe"),
    "PP2 x EP2": Row({"world": 4, "pp": 2, "ep": 2}, "moe"),
}
REFERENCES = {"dense": "one process", "moe": "one process, MoE"}


def make_model(folder: Path, kind: str) -> None:
    """A Hugging Face folder of a tiny Qwen3-VL in which every weight, norm and bias matters."""
    from copd_megatron.policy.platform import declare_torchvision_schemas

    declare_torchvision_schemas()
    import torch
    import transformers

    text: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }
    if kind == "moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    name = "Qwen3VLMoe" if kind == "moe" else "Qwen3VL"
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
            "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 64,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=kind == "tied",
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(mean, 0.1, generator=generator)
    model.save_pretrained(folder)


def make_samples(seed: int) -> list[Sample]:
    """Groups of responses to prompts with and without images, half of them scored by a teacher."""
    import torch

    from copd_megatron.policy.batching import NATIVE, Sample
    from copd_megatron.randomness import generator
    from copd_megatron.rollout.types import Media, Prompt, Rollout, TeacherScores

    draw = generator(seed, "samples")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, 40, (count,), generator=draw).tolist())

    def question(number: int) -> Prompt:
        if number % 2 == 0:
            return Prompt(f"text{number}", "text", ids(4 + 3 * number), "", "exact", "")
        grids = torch.tensor([[1, 2, 4], [1, 4, 4]])[: 1 + number // 2 % 2]
        tokens: tuple[int, ...] = ids(2)
        for grid in grids:
            tokens += (START, *[IMAGE] * (int(grid.prod()) // MERGE**2), END)
        pixels = torch.randn(int(grids.prod(1).sum()), 3 * 2 * PATCH**2, generator=draw)
        return Prompt(f"image{number}", "image", tokens + ids(3), "", "exact", "", Media(pixels, grids))

    samples = []
    for number in range(6):
        prompt, source = question(number), number // 2 % 2 - 1
        for member in range(GROUP):
            size = 1 + (3 * number + 5 * member) % 9
            scores = None
            if source != NATIVE:
                full = torch.randn(size, VOCAB, generator=draw).log_softmax(-1)
                top = full.topk(TOP_K)
                scores = TeacherScores("peer", 0, full[:, 7], top.indices, top.values)
            logprobs = -3.5 + 0.3 * torch.randn(size, generator=draw)
            rollout = Rollout(prompt, ids(size), logprobs, "stop", 0, "", None, scores)
            advantage = float(torch.randn((), generator=draw)) if source == NATIVE else 0.0
            samples.append(Sample(rollout, source, advantage))
    return samples


def member(work: Path, name: str) -> None:
    """What every process of a row's gang does; the first writes the results."""
    import torch

    torch.set_num_threads(1)
    from safetensors.torch import save_file

    from copd_megatron.objectives.branch_loss import branch_loss
    from copd_megatron.objectives.settings import LossSettings
    from copd_megatron.policy import layout as layouts
    from copd_megatron.policy.batching import NATIVE
    from copd_megatron.policy.optimizer import OptimizerSettings
    from copd_megatron.policy.schedule import over_replicas
    from copd_megatron.policy.trainer import Policy

    row = ROWS[name]
    layout = layouts.Layout(**row.degrees)
    layouts.initialize(layout)
    settings = OptimizerSettings(lr=1e-2, eps=1e-3, clip_grad=0, **(row.optimizer or {}))
    loss = partial(branch_loss, settings=LossSettings(opd_loss="topk_forward", overlap_k=5, teachers=1))
    for kind in MODELS[row.model]:
        policy = Policy(work / kind, layout, settings, "fp32", 80, recompute=row.recompute)
        results: dict[str, torch.Tensor] = {}
        metrics = []
        for step in range(UPDATES):
            samples = make_samples(step)
            mine = _share(samples, layouts.data_parallel_rank(), layout.dp)
            if step == 0:
                parts = over_replicas([part.tolist() for part in policy.logprobs(mine)])
                order = [
                    position for rank in range(layout.dp) for position in _share(range(len(samples)), rank, layout.dp)
                ]
                flat = [values for part in parts for values in part]
                by_sample = [flat[order.index(position)] for position in range(len(samples))]
                results["logprobs"] = torch.tensor([value for values in by_sample for value in values])
            counts = {NATIVE: sum(sample.source == NATIVE for sample in samples), 0: len(samples)}
            metrics.append(policy.update(mine, loss, counts))
            if step == 0 and not settings.distributed:
                results |= {f"gradients/{key}": value for key, value in _gradients(policy).items()}
        results |= {f"weights/{key}": value.contiguous().clone() for key, value in policy.named_weights()}
        if torch.distributed.get_rank() == 0:
            save_file(results, work / f"{name}.{kind}.safetensors")
            (work / f"{name}.{kind}.json").write_text(json.dumps(metrics))
    layouts.shutdown()


def _share(items: Sequence[Any], rank: int, replicas: int) -> list[Any]:
    """Unequal parts: the first replica gets a third of what the others get."""
    if replicas == 1:
        return list(items)
    first = len(items) // 6
    return list(items[:first]) if rank == 0 else list(items[first:][rank - 1 :: replicas - 1])


def _gradients(policy: Any) -> dict[str, torch.Tensor]:
    """The last update's gradients under Hugging Face names, on the first rank."""
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.module.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad
    gathered = {name: value.contiguous().clone() for name, value in policy.named_weights()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return gathered


def run_row(work: Path, name: str) -> None:
    """Run a row's gang to its end. Raises SystemExit with a rank's last words if one fails."""
    world, logs = ROWS[name].world, work / f"{name}.logs"
    logs.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--member", name, "--work", str(work)]
    codes = launch.run(command, world, logs, TIMEOUT)
    for rank, code in enumerate(codes):
        if code:
            words = (logs / f"{rank}.err").read_text()[-3000:]
            raise SystemExit(f"{name}: rank {rank} of {world} ended with status {code}\n{words}")
    if None in codes:
        raise SystemExit(f"{name}: no result after {TIMEOUT:g} s; the last words of each rank are in {logs}")


def differences(work: Path, name: str) -> dict[str, float | None]:
    """Largest difference to one process per quantity of TOLERANCES, over the row's models; None where not compared."""
    from safetensors.torch import load_file

    worst: dict[str, float | None] = dict.fromkeys(TOLERANCES)
    row = ROWS[name]
    for kind in MODELS[row.model]:
        found = load_file(work / f"{name}.{kind}.safetensors")
        expected = load_file(work / f"{REFERENCES[row.model]}.{kind}.safetensors")
        for key, value in expected.items():
            quantity = key.partition("/")[0]
            if key not in found:
                if quantity == "gradients" and row.optimizer:
                    continue  # sharded over replicas
                raise SystemExit(f"{name}: {key} is missing")
            difference = (found[key] - value).abs().max()
            if quantity == "gradients":
                difference = (found[key] - value).norm() / value.norm().clamp(min=1e-12)
            worst[quantity] = max(worst[quantity] or 0.0, float(difference))
    return worst


def main() -> None:
    """Run the rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--work", type=Path, help="keep models and results here")
    parser.add_argument("--member", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        member(arguments.work, arguments.member)
        return
    with tempfile.TemporaryDirectory() as folder:
        passed = compare(arguments.work or Path(folder), arguments.rows)
    raise SystemExit(0 if passed else 1)


def compare(work: Path, names: Sequence[str]) -> bool:
    """Run the rows `names` with files in `work`, print the table; whether all agree with one process."""
    work.mkdir(parents=True, exist_ok=True)
    models = {ROWS[name].model for name in names}
    for model in models:
        for kind in MODELS[model]:
            if not (work / kind).exists():
                make_model(work / kind, kind)
    table = Table(title="largest difference to one process, float32")
    for column in ("layout", "processes", *(f"{key} (≤ {limit:g})" for key, limit in TOLERANCES.items()), ""):
        table.add_column(column, justify="left" if column == "layout" else "right")
    console, passed = Console(width=max(Console().width, 120)), True
    for name in dict.fromkeys([*(REFERENCES[model] for model in sorted(models)), *names]):
        console.print(f"{name} …")
        run_row(work, name)
        found = differences(work, name)
        good = all(value is None or value <= TOLERANCES[key] for key, value in found.items())
        passed &= good
        shown = ("–" if value is None else f"{value:.1e}" for value in found.values())
        table.add_row(name, str(ROWS[name].world), *shown, "passes" if good else "FAILS")
    console.print(table)
    return passed


if __name__ == "__main__":
    main()
