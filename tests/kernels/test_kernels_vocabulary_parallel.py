"""The vocabulary in parts on one, two and four ranks: every operation gives what the whole gives, on every rank."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from copd_kernels import choice, logprobs
from copd_kernels.device import launch
from copd_kernels.linear_token_kl import Head, TopK, linear_token_kl
from copd_kernels.token_kl import token_kl
from copd_kernels.topk import topk, topk_overlap
from copd_kernels.topk_kl import topk_kl
from copd_kernels.vocabulary import Vocabulary

sys.path.append(str(Path(__file__).parents[1] / "policy"))
import gang

TOKENS, VOCABULARY, HIDDEN, K, TEMPERATURE = 5, 97, 4, 6, 0.7
PARTS = [(97,), (50, 47), (97, 0), (30, 5, 45, 17)]
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0])
RUNS = ("reference", "triton")

Results = dict[str, torch.Tensor]


def inputs(run: str) -> dict[str, torch.Tensor]:
    """Ties, a token whose first rank is 400 below, masked columns (all of some ranks'), a NaN, an ignored NaN."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float64 if run == "reference" else torch.float32
    student = (torch.randn(TOKENS, VOCABULARY, generator=generator) * 4).round() / 2
    teacher = (student + torch.randn(TOKENS, VOCABULARY, generator=generator) * 2).round() / 2
    student[0, :30] -= 400
    student[1, 50:] = -math.inf
    teacher[1, 60:] = -math.inf
    student[2, 3] = math.nan
    student[4, 80] = math.nan
    return {
        "student": student.to(dtype),
        "teacher": teacher.to(dtype),
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype),
        "lm_head": torch.randn(VOCABULARY, HIDDEN, generator=generator).to(dtype),
    }


def operations(data: dict[str, torch.Tensor], columns: slice, vocabulary: Vocabulary | None) -> Iterator[Any]:
    """Name and results of every operation on this rank's columns; what ends in "gradient" is of them alone."""
    teacher_logprobs, ids = torch.log_softmax(data["teacher"].double() / TEMPERATURE, dim=-1).topk(K)
    student, teacher = data["student"][:, columns], data["teacher"][:, columns]
    arguments = {"weights": WEIGHTS, "vocabulary": vocabulary}
    top = topk(student, 9, TEMPERATURE, vocabulary=vocabulary)
    kept = torch.tensor([0, 1, 3])  # of rows with NaN, ids have no meaning
    yield "topk", {"ids": top.ids[kept], "logprobs": top.logprobs[kept], "logsumexp": top.logsumexp}
    yield (
        "overlap",
        {
            "of ids": topk_overlap(student, ids, 4, vocabulary=vocabulary),
            "of logits": topk_overlap(student, teacher, 8, vocabulary=vocabulary),
            "of rows": topk_overlap(student, ids[kept], 4, vocabulary=vocabulary, rows=kept),
        },
    )
    for kind in ("reverse", "forward", "jsd"):
        for when in ("later", "overwrite") if choice.on_triton(student) else ("later",):
            leaf = student.detach().clone().requires_grad_()
            found = token_kl(leaf * 1, teacher, kind, 0.3, TEMPERATURE, gradient=when, targets=ids[:, 0], **arguments)
            numbers = {"loss": found.loss.detach(), "entropy": found.entropy, "logprob": found.logprob}
            yield f"token_kl {kind} {when}", numbers | {"gradient": gradient(found.loss, leaf)}
            for tail in ("bucket", "renormalise")[: 1 + (when == "later")]:
                leaf = student.detach().clone().requires_grad_()
                options = arguments | {"gradient": when, "tail": tail, "temperature": TEMPERATURE}
                loss = topk_kl(leaf * 1, ids, teacher_logprobs, kind, 0.3, **options)
                yield f"topk_kl {kind} {tail} {when}", {"loss": loss.detach(), "gradient": gradient(loss, leaf)}
        for name, given in (
            ("head", Head(data["hidden"].flip(0), data["lm_head"][columns].flip(1))),
            ("top-k", TopK(ids, teacher_logprobs)),
        ):
            hidden = data["hidden"].clone().requires_grad_()
            lm_head = data["lm_head"][columns].clone().requires_grad_()
            fused = linear_token_kl(hidden, lm_head, given, kind, 0.3, chunk=3, **arguments)
            fused.total.backward()
            yield (
                f"linear {kind} {name}",
                {"loss": fused.loss, "hidden": hidden.grad, "lm_head gradient": lm_head.grad.t()},
            )


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss[[0, 1, 2, 3]].sum(), leaf)[0][:4]  # without the row whose loss is NaN


def evaluate_parts() -> dict[Any, Any]:
    """What this rank gets, by parts, implementation and operation."""
    launch.BLOCK, launch.LANES = 32, dict.fromkeys(launch.LANES, 128)
    dist.init_process_group("gloo")
    groups = {size: dist.new_group(range(size)) for size in (1, 2, 4)}
    results: dict[Any, Any] = {}
    for run in RUNS:
        os.environ[choice.VARIABLE] = run
        for widths in PARTS:
            if dist.get_rank() < len(widths):
                end = list(accumulate(widths))[dist.get_rank()]
                start = end - widths[dist.get_rank()]
                part = Vocabulary(start, VOCABULARY, groups[len(widths)])
                for name, values in operations(inputs(run), slice(start, end), part):
                    results[run, widths, name] = values
    dist.destroy_process_group()
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    """Each of four ranks' `evaluate_parts`."""
    return gang.run(4, evaluate_parts)


@pytest.fixture(scope="module")
def whole() -> dict[str, Results]:
    """The references in float64, of the vocabulary in one part."""
    return dict(operations(inputs("reference"), slice(None), None))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("widths", PARTS, ids=str)
def test_parts_give_what_the_whole_gives(ranks, whole, widths, run):
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if run == "reference" else {"rtol": 2e-5, "atol": 2e-5}
    for name, expected in whole.items():
        for rank in range(len(widths)):
            found = ranks[rank][run, widths, name]
            overwritten = ranks[rank].get((run, widths, name.replace("later", "overwrite")), {})
            assert set(found) == set(expected)
            for key, value in expected.items():
                if key.endswith("gradient"):
                    value = value.split(widths, dim=1)[rank]
                where = f"{name}, {key}, rank {rank}"
                for result in (found[key], overwritten.get(key, found[key])):
                    result = result.to(value.dtype)
                    torch.testing.assert_close(result, value, **tolerance, equal_nan=True, msg=where)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("widths", [widths for widths in PARTS if len(widths) > 1], ids=str)
def test_all_ranks_have_the_same_numbers_to_the_last_bit(ranks, widths, run):
    for key in (key for key in ranks[0] if key[:2] == (run, widths)):
        for other in ranks[1 : len(widths)]:
            for name, value in ranks[0][key].items():
                same = name.endswith("gradient") or torch.equal(value.nan_to_num(7), other[key][name].nan_to_num(7))
                assert same, (key, name)


def test_the_inputs_are_what_they_are_for(whole):
    assert whole["overlap"]["of ids"].isnan().tolist() == [False, False, True, False, True]
    assert whole["token_kl jsd later"]["loss"].isnan().tolist() == [False, False, False, False, True]
    assert 0 < whole["overlap"]["of ids"][[0, 1, 3]].sum() < 3
    assert all(values["loss"][2] == 0 for name, values in whole.items() if "_kl" in name)
    assert logprobs.MAX_LISTED == launch.SLOTS
