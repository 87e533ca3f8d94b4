"""Every configuration in which the kernels are launched, as the compiler is given it: what the compile gate compiles.

A configuration is a kernel, the types of its arguments and its constants. Pointers and strides that are multiples of 16
let the compiler load 16 bytes at once; `odd` configurations are those of a vocabulary, or rows, that are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from copd_kernels.device import launch, partition, rows, token_kl, topk

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
KINDS = ("reverse", "forward", "jsd")
WIDTHS = {False: (16,), True: (1,)}
PHASES = ("all", "sums", "middle", "finish")


@dataclass(frozen=True)
class Configuration:
    """`kernel` with `types` of its arguments in order (constants left out), `constants` and a limit of registers."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    registers: int | None
    aligned: tuple[str, ...]
    """Arguments that are multiples of 16."""


def _configuration(
    label: str, kernel: Any, family: str, types: dict[str, str], constants: dict[str, Any], odd: bool
) -> Configuration:
    aligned = () if odd else tuple(name for name, kind in types.items() if kind.startswith("*") or _is_width(name))
    name = f"{kernel.__name__.removesuffix('_kernel')} {label}{' odd' if odd else ''}"
    return Configuration(name, kernel, types, constants, launch.register_limit(family, WIDTHS[odd]), aligned)


def _is_width(name: str) -> bool:
    return name == "V" or name.endswith("stride")


def _topk(dtype: torch.dtype, what: str, picked: bool, odd: bool) -> Configuration:
    types = {
        "x_ptr": f"*{NAMES[dtype]}", "rows_ptr": "*i64" if picked else "*i32", "teacher_ptr": "*i32", "ids_ptr": "*i32",
        "overlap_ptr": "*fp32", "logsumexp_ptr": "*fp32", "V": "i32", "x_stride": "i32", "K": "i32", "TEACHER": "i32",
        "scale": "fp32",
    }  # fmt: skip
    top = what != "overlap"
    constants = {
        "G": launch.lanes(dtype, WIDTHS[odd]), "TP": launch.SLOTS, "ROWS": picked, "OVERLAP": what != "top",
        "IDS": top, "LOGSUMEXP": top,
    }  # fmt: skip
    label = f"{NAMES[dtype]} {what}{' rows' if picked else ''}"
    return _configuration(label, topk.topk_kernel, "topk" if top else "topk overlap", types, constants, odd)


def _partition_sums(dtype: torch.dtype, odd: bool) -> Configuration:
    types = {
        "x_ptr": f"*{NAMES[dtype]}", "ids_ptr": "*i32", "weight_ptr": "*fp32", "sums_ptr": "*fp32", "listed_ptr":
        "*fp32", "V": "i32", "x_stride": "i32", "start": "i32", "size": "i32", "K": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {"KP": launch.SLOTS, "BLOCK": launch.BLOCK}
    return _configuration(NAMES[dtype], partition.partition_sums_kernel, "partition", types, constants, odd)


def _partition_gradient(dtype: torch.dtype, odd: bool) -> Configuration:
    types = {
        "x_ptr": f"*{NAMES[dtype]}", "g_ptr": f"*{NAMES[dtype]}", "ids_ptr": "*i32", "at_ids_ptr": "*fp32", "row_ptr":
        "*fp32", "V": "i32", "x_stride": "i32", "g_stride": "i32", "start": "i32", "K": "i32", "scale": "fp32",
    }  # fmt: skip
    constants = {"KP": launch.SLOTS, "BLOCK": launch.BLOCK}
    return _configuration(NAMES[dtype], partition.partition_gradient_kernel, "partition", types, constants, odd)


def _topk_kl(dtype: torch.dtype, kind: int, odd: bool) -> Configuration:
    types = {
        "x_ptr": f"*{NAMES[dtype]}", "g_ptr": f"*{NAMES[dtype]}", "ids_ptr": "*i32", "teacher_ptr": "*fp32",
        "teacher_tail_ptr": "*fp32", "weight_ptr": "*fp32", "loss_ptr": "*fp32", "V": "i32", "x_stride": "i32",
        "g_stride": "i32", "K": "i32", "scale": "fp32", "beta": "fp32", "floor": "fp32",
    }  # fmt: skip
    constants = {"KIND": kind, "KP": launch.SLOTS, "BLOCK": launch.BLOCK}
    return _configuration(f"{NAMES[dtype]} {KINDS[kind]}", partition.topk_kl_kernel, "topk_kl", types, constants, odd)


def _token_kl(dtype: torch.dtype, kind: int, phase: int, gradient: bool, odd: bool) -> Configuration:
    types = {
        "s_ptr": f"*{NAMES[dtype]}", "t_ptr": f"*{NAMES[dtype]}", "g_ptr": f"*{NAMES[dtype]}", "targets_ptr": "*i64",
        "weight_ptr": "*fp32", "sums_ptr": "*fp32", "out_ptr": "*fp32", "V": "i32", "s_stride": "i32",
        "t_stride": "i32", "g_stride": "i32", "start": "i32", "scale": "fp32", "beta": "fp32",
    }  # fmt: skip
    constants = {"KIND": kind, "PHASE": phase, "TARGETS": True, "GRADIENT": gradient, "BLOCK": launch.BLOCK}
    label = f"{NAMES[dtype]} {KINDS[kind]} {PHASES[phase]}{' gradient' if gradient else ''}"
    return _configuration(label, token_kl.token_kl_kernel, "token_kl", types, constants, odd)


def _scale_rows(dtype: torch.dtype, odd: bool) -> Configuration:
    types = {"g_ptr": f"*{NAMES[dtype]}", "factor_ptr": "*fp32", "V": "i32", "g_stride": "i32"}
    return _configuration(NAMES[dtype], rows.scale_rows_kernel, "rows", types, {"BLOCK": launch.BLOCK}, odd)


def configurations() -> Iterator[Configuration]:
    """Every kernel in every format, kind and phase, aligned; and all of them once more in bfloat16 with odd rows."""
    for odd, formats in ((False, tuple(NAMES)), (True, (torch.bfloat16,))):
        for dtype in formats:
            yield _scale_rows(dtype, odd)
            yield _partition_sums(dtype, odd)
            yield _partition_gradient(dtype, odd)
            for kind in range(3):
                for phase, gradient in ((0, True), (1, False), (3, False), (3, True), *(((2, False),) * (kind == 2))):
                    yield _token_kl(dtype, kind, phase, gradient, odd)
                yield _topk_kl(dtype, kind, odd)
            for what in ("overlap", "top", "both"):
                yield _topk(dtype, what, False, odd)
            yield _topk(dtype, "overlap", True, odd)
