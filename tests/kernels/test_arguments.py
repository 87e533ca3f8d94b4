"""Wrong arguments are named, with what they are and what was expected."""

from __future__ import annotations

import pytest
import torch

from copd_kernels.choice import on_triton
from copd_kernels.linear_token_kl import Head, Logits, TopK, linear_token_kl
from copd_kernels.token_kl import token_kl
from copd_kernels.topk import topk, topk_and_overlap, topk_overlap
from copd_kernels.topk_kl import topk_kl

X = torch.zeros(3, 8)
IDS = torch.zeros(3, 2, dtype=torch.int64)
LOGPROBS = torch.zeros(3, 2)
META = torch.zeros(3, 8, device="meta")

WRONG = [
    (lambda: topk(torch.zeros(8), 2), ValueError, r"student_logits has shape \[8\], expected two dimensions"),
    (lambda: topk(torch.zeros(3, 8, dtype=torch.int64), 2), TypeError, "student_logits is torch.int64"),
    (lambda: topk(X, 9), ValueError, "k is 9, expected 1 to 8 for a vocabulary of 8"),
    (lambda: topk(torch.zeros(1, 200), 129), ValueError, "k is 129, expected 1 to 128"),
    (lambda: topk(X, 2, temperature=0.0), ValueError, "temperature is 0.0"),
    (lambda: topk(X, 2, rows=torch.tensor([1], dtype=torch.int32)), ValueError, r"rows is torch.int32 \[1\]"),
    (lambda: topk_overlap(X, IDS[:2], 2), ValueError, r"teacher has shape \[2, 2\], expected \[tokens, K\] with the 3"),
    (lambda: topk_overlap(X, IDS, 3), ValueError, "overlap@3: k must lie between 1 and 2"),
    (lambda: topk_overlap(X, torch.zeros(3, 9), 2), ValueError, r"teacher has shape \[3, 9\], expected \[3, 8\]"),
    (lambda: topk_overlap(X, META, 2), ValueError, "teacher is on meta, but student_logits is on cpu"),
    (lambda: topk_and_overlap(X, LOGPROBS, 2), TypeError, "teacher is torch.float32, expected one of int32, int64"),
    (lambda: topk_kl(X, IDS, LOGPROBS[:, :1], "reverse"), ValueError, r"teacher_logprobs has shape \[3, 1\], expected"),
    (lambda: topk_kl(X, IDS.float(), LOGPROBS, "reverse"), TypeError, "teacher_ids is torch.float32"),
    (lambda: topk_kl(X, IDS[:, :0], LOGPROBS[:, :0], "reverse"), ValueError, "teacher_ids has 0 ids per token"),
    (lambda: topk_kl(X, IDS, LOGPROBS, "backward"), ValueError, "kind is 'backward', expected one of reverse, forward"),
    (lambda: topk_kl(X, IDS, LOGPROBS, "jsd", 1.5), ValueError, "jsd_beta is 1.5, expected a number from 0 to 1"),
    (lambda: topk_kl(X, IDS, LOGPROBS, "jsd", tail="none"), ValueError, "tail is 'none', expected one of bucket"),
    (lambda: topk_kl(X, IDS, LOGPROBS, "jsd", weights=torch.ones(2)), ValueError, r"weights has shape \[2\]"),
    (lambda: token_kl(X, X[:2], "reverse"), ValueError, r"teacher_logits has shape \[2, 8\], expected \[3, 8\]"),
    (lambda: token_kl(X, META, "reverse"), ValueError, "teacher_logits is on meta"),
    (lambda: token_kl(X, X, "reverse", targets=IDS), ValueError, r"targets has shape \[3, 2\], expected \[tokens\]"),
    (lambda: token_kl(X, X, "reverse", targets=IDS[:, 0].int()), TypeError, "targets is torch.int32"),
    (lambda: token_kl(X, X, "reverse", weights=IDS[:, 0]), TypeError, "weights is torch.int64"),
    (lambda: linear_token_kl(X, torch.zeros(5, 7), TopK(IDS, LOGPROBS), "reverse"), ValueError, "lm_head has shape"),
    (lambda: linear_token_kl(X, X.double(), TopK(IDS, LOGPROBS), "reverse"), TypeError, "lm_head is torch.float64"),
    (lambda: linear_token_kl(X, X, Logits(torch.zeros(3, 4)), "reverse"), ValueError, r"expected \[3, 3\]"),
    (lambda: linear_token_kl(X, X, Head(X[:2], X), "reverse"), ValueError, "2 tokens and 3 ids, expected 3 and 3"),
    (lambda: linear_token_kl(X, X, TopK(IDS, LOGPROBS), "reverse", chunk=0), ValueError, "chunk is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_a_wrong_argument_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_kernels_run_on_cuda_and_references_elsewhere(monkeypatch):
    monkeypatch.delenv("COPD_KERNELS", raising=False)
    assert not on_triton(X)
    monkeypatch.setenv("COPD_KERNELS", "triton")
    assert on_triton(X)
    assert not on_triton(X.double()), "float64 is for the references"
    monkeypatch.setenv("COPD_KERNELS", "gpu")
    with pytest.raises(ValueError, match="COPD_KERNELS is 'gpu'; expected auto, triton or reference"):
        on_triton(X)
