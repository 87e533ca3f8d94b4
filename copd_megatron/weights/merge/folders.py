"""Merging the branches into one model: the paper's parameter average (docs/method.md) and other methods.

    copd merge text/ image/ --base base/ --method linear -o merged/
    torchrun --nproc-per-node 4 --no-python copd merge text/ image/ --base base/ --method ties --density 0.2 -o merged/

Arithmetic is float32 whatever the files hold, and the result is rounded once, to the base's number format. Slices of a
megabyte are read, merged and written by one thread per tensor, so memory does not grow with the model. A merge that is
interrupted goes on where it was when it is started again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from copd_megatron.errors import WeightsError
from copd_megatron.weights.hf import SHARD_BYTES, refuse_content
from copd_megatron.weights.merge.checks import check_disk, check_models, check_vocabularies
from copd_megatron.weights.merge.gang import Gang
from copd_megatron.weights.merge.partial import PartialFolder
from copd_megatron.weights.merge.plan import shards_of, share
from copd_megatron.weights.merge.progress import MergeProgress
from copd_megatron.weights.merge.recipe import Recipe
from copd_megatron.weights.merge.report import write_report
from copd_megatron.weights.merge.sources import open_source
from copd_megatron.weights.merge.stream import CHUNK
from copd_megatron.weights.merge.work import Merge, write_shards

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Of what a merge computes: raised when the same recipe gives other bits, so that no shard of an older one is kept."""


def merge_folders(
    inputs: Sequence[Path],
    out: Path,
    base: Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    report: Path | None = None,
    console: Console | None = None,
    gang: Gang | None = None,
    trust: bool = False,
    chunk: int = CHUNK,
) -> None:
    """Merge `inputs` into the Hugging Face folder `out`, in the form of `base`, by `recipe` (linear).

    Inputs are Hugging Face folders or Megatron distributed checkpoints, of any layouts; checkpoints without a valid
    manifest of ours are read only with `trust`, because their index is a pickle. The Hugging Face folder `base` gives
    the names, shapes, number formats, configuration and tokenizer. `jobs`: threads, by default one per core. `report`:
    where to write how the inputs differ, as JSON, with a picture beside it. `gang`: the processes that share the work,
    all of which call this with the same arguments. `chunk`: elements of a slice; no bit depends on it.

    Raises ConfigError for a recipe that does not fit the inputs; WeightsError, before any work is done, if an input is
    not a model of the same architecture, vocabulary and shapes as the base, `out` has content and `overwrite` is off,
    or the disk is too small; and WeightsError if a model holds a value that is not finite. `out` is then as it was.
    """
    recipe = recipe or Recipe()
    gang = gang or Gang()
    with gang.together(), ExitStack() as stack:
        recipe.check_inputs(len(inputs))
        refuse_content(out, "config.json", overwrite)
        reference = open_source(base)
        stack.callback(reference.close)
        sources = []
        for path in inputs:
            sources.append(open_source(path, base, trust))
            stack.callback(sources[-1].close)
        check_models(reference, sources)
        check_vocabularies(base, inputs)
        recipe.check_patterns(reference.names())
        shards = shards_of({name: reference.form(name) for name in reference.names()}, max_shard_bytes)
        everything = {
            "format": _FORMAT,
            "recipe": asdict(recipe),
            "base": reference.identity(),
            "inputs": [source.identity() for source in sources],
            "max_shard_bytes": max_shard_bytes,
            "report": report is not None,
        }
        folder = PartialFolder(out)
        gang.meet("checked")
        try:
            if gang.rank == 0:
                check_disk(folder.out.parent, folder.bytes_to_come(shards))
                stack.enter_context(folder.held())
            gang.first(lambda: folder.begin(everything), "begun")
            mine = share(shards, gang.rank, gang.world)
            missing = [shard for shard in mine if folder.finished(shard) is None]
            logger.info("merging %s into %s by %s", ", ".join(map(str, inputs)), out, recipe)
            merge = Merge(reference, sources, recipe, report is not None, chunk)
            total = sum(shard.nbytes for shard in mine)
            with MergeProgress(total, len(mine), console if gang.rank == 0 else None) as progress:
                for shard in mine:
                    if shard not in missing:
                        progress.shard(shard, kept=True)
                write_shards(merge, missing, folder, progress, jobs or os.cpu_count() or 1, gang.check)
            gang.meet("written")

            def complete() -> None:
                if report is not None:
                    records: dict[str, Any] = folder.records(shards)
                    measured = {name: record["measured"] for name, record in records.items() if "measured" in record}
                    write_report(report, measured, reference.label, [source.label for source in sources], recipe)
                folder.complete(shards, base)

            gang.first(complete, "complete")
        except OSError as error:
            raise WeightsError(f"{out}: could not be written ({error}); it is as it was before") from error
