"""Between Hugging Face folders and Megatron distributed checkpoints, bit by bit.

    copd convert to-megatron base/ base_megatron/
    copd convert to-hf base_megatron/ base_again/
    torchrun --nproc-per-node 8 -m copd_megatron.cli convert to-hf base_megatron/ base_again/

The model is never built, and no more of it than one row of its family's weight table is in memory of each process. A
checkpoint can be loaded on any layout, and can have been saved on any. It keeps the Hugging Face folder's
configuration, tokenizer and processor under `hf/`, so that nothing else is needed for the way back.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from math import lcm
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal

from copd_megatron.errors import WeightsError
from copd_megatron.policy.layout import Layout
from copd_megatron.weights.crew import ALONE, Crew, Failed
from copd_megatron.weights.form import ModelForm
from copd_megatron.weights.hf import SHARD_BYTES, HfFolder, copy_model_files
from copd_megatron.weights.hf_shards import forms_of, plan_shards, write_shards
from copd_megatron.weights.mapping import check_names
from copd_megatron.weights.megatron_source import HF_FILES, MARKER, MegatronSource
from copd_megatron.weights.megatron_writer import Record, Rows, plan_records, rows_of, write_checkpoint
from copd_megatron.weights.out_folder import open_place, refuse_small_disk, whole_folder
from copd_megatron.weights.progress import Progress

logger = logging.getLogger(__name__)

FORMATS = (torch.float32, torch.bfloat16)
"""What all tensors of a model of the policy can be."""


def to_megatron(
    hf_dir: Path, ckpt_dir: Path, overwrite: bool = False, layout: Layout | None = None, crew: Crew = ALONE
) -> None:
    """Write the Hugging Face folder `hf_dir` as a Megatron distributed checkpoint (torch_dist).

    The checkpoint is the same for every layout; `layout` is one that the model must be divisible by. With several
    processes in `crew`, each calls this and writes a share.

    Raises WeightsError or ConfigError, and leaves `ckpt_dir` as it is, if the folder is damaged, of a model the policy
    does not know or that `layout` does not divide, neither all float32 nor all bfloat16, if the disk has too little
    room, or if `ckpt_dir` has content and `overwrite` is off.
    """
    open_place(ckpt_dir, MARKER, overwrite, crew)
    source = crew.together(lambda: HfFolder(hf_dir))
    records = plan_megatron(source, crew, layout)
    crew.together(lambda: refuse_small_disk({ckpt_dir: bytes_of(records)}))
    write_megatron(source, records, ckpt_dir, overwrite, crew)
    if crew.rank == 0:
        logger.info("wrote %s as a Megatron checkpoint (%s) to %s", hf_dir, decimal(bytes_of(records)), ckpt_dir)


def plan_megatron(source: HfFolder, crew: Crew = ALONE, layout: Layout | None = None) -> list[Record]:
    """What the Megatron checkpoint of a model like `source` holds. Collective; raises what `to_megatron` says."""
    form = crew.together(lambda: ModelForm(source.path, layout))
    crew.together(lambda: _refuse_tensors(source, form))
    return crew.together(lambda: plan_records(source, form))


def write_megatron(
    source: HfFolder,
    records: Sequence[Record],
    ckpt_dir: Path,
    overwrite: bool = False,
    crew: Crew = ALONE,
    rows: Rows | None = None,
    console: Console | None = None,
) -> None:
    """Write `records` as a Megatron checkpoint with the configuration, tokenizer and processor of `source`.

    The tensors are those of `rows`, by default of `source`. Collective; WeightsError, and nothing is changed, if one
    process cannot write.
    """
    mine = sum(records[number].nbytes for number in crew.share([record.nbytes for record in records]))
    what = "converting" if rows is None else "merging"
    with (
        _shared_folder(ckpt_dir, MARKER, overwrite, crew) as folder,
        Progress(what, mine, crew, console or Console(stderr=True)) as progress,
    ):
        write_checkpoint(rows or rows_of(source), records, folder, crew, progress.done)
        crew.together(lambda: _copy_form(source.path, folder / HF_FILES) if crew.rank == 0 else None)


def bytes_of(records: Sequence[Record]) -> int:
    """What the tensors of `records` take on disk."""
    return sum(record.nbytes for record in records)


def to_hf(
    ckpt_dir: Path,
    hf_dir: Path,
    base: Path | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    trust: bool = False,
    crew: Crew = ALONE,
) -> None:
    """Write the model in a Megatron distributed checkpoint as a Hugging Face folder.

    Configuration, tokenizer and processor come from the folder `base`, by default from the checkpoint's own `hf/`.
    Weights lie in files of at most `max_shard_bytes` (or one larger tensor). `trust` and what is refused are as in
    `MegatronSource`; WeightsError also if the disk has too little room, or if `hf_dir` has content and `overwrite` is
    off. With several processes in `crew`, each calls this and writes a share.
    """
    open_place(hf_dir, "config.json", overwrite, crew)
    source = MegatronSource(ckpt_dir, base, trust, crew)
    shards = plan_shards(forms_of(source), max_shard_bytes)
    sizes = [shard.nbytes for shard in shards]
    total = sum(sizes)
    crew.together(lambda: refuse_small_disk({hf_dir: total}))
    if crew.rank == 0 and (rows := source.padding()):
        logger.info("leaving out %d rows by which the vocabulary was padded", rows)
    mine = sum(sizes[number] for number in crew.share(sizes))
    if crew.rank == 0 and (idle := crew.size - len(shards)) > 0:
        logger.info("%d processes have nothing to do; smaller shards would occupy them", idle)
    with (
        _shared_folder(hf_dir, "config.json", overwrite, crew) as folder,
        Progress("converting", mine, crew, Console(stderr=True)) as progress,
    ):
        crew.together(lambda: copy_model_files(source.form, folder) if crew.rank == 0 else None)
        write_shards(source, shards, folder, crew, progress.done)
    if crew.rank == 0:
        logger.info("wrote %s (%s) as a Hugging Face folder to %s", ckpt_dir, decimal(total), hf_dir)


def layout_of(tp: int = 1, pp: int = 1, vpp: int = 1, ep: int = 1, etp: int = 0) -> Layout:
    """The smallest layout with these degrees of parallelism."""
    world = lcm(tp * pp, ep * (etp or tp) * pp)
    return Layout(world, tp=tp, pp=pp, vpp=vpp, ep=ep, etp=etp, sequence_parallel=tp > 1)


@contextmanager
def _shared_folder(out: Path, marker: str, overwrite: bool, crew: Crew) -> Iterator[Path]:
    """`whole_folder` for all processes: the first one's. Collective, and so must be all that can fail inside."""
    first = crew.rank == 0
    with ExitStack() as stack:
        folder = crew.together(lambda: stack.enter_context(whole_folder(out, marker, overwrite)) if first else None)
        try:
            yield crew.gathered(folder)[0]  # type: ignore[misc]
            crew.together(stack.close)
        except WeightsError as error:
            with suppress(WeightsError):
                stack.__exit__(type(error), error, error.__traceback__)
            crew.gathered(None)  # nothing is left of what was begun: torchrun may now end all
            if isinstance(error, Failed):
                raise WeightsError(f"{out}: could not be written ({error}); it is as it was before") from error
            raise


def _copy_form(hf_dir: Path, folder: Path) -> None:
    folder.mkdir()
    copy_model_files(hf_dir, folder)


def _refuse_tensors(source: HfFolder, form: ModelForm) -> None:
    try:
        check_names(source.names(), form.table)
    except WeightsError as error:
        raise WeightsError(f"{source.path}: {error}") from error
    formats = {source.dtype(name) for name in source.names()}
    if len(formats) > 1 or not formats <= set(FORMATS):
        found, expected = ", ".join(sorted(map(str, formats))), " or ".join(map(str, FORMATS))
        raise WeightsError(f"{source.path}: tensors are {found}; expected all of them to be {expected}")
