"""Merging the branches into one model: the paper's parameter average (docs/method.md) and other methods.

    copd merge text/ image/ --base base/ --method linear -o merged/
    copd merge text/ image/ --base base/ --megatron merged_megatron/
    torchrun --nproc-per-node 4 --no-python copd merge text/ image/ --base base/ --method ties --density 0.2 -o merged/

Arithmetic is float32 whatever the files hold, and the result is rounded once, to the base's number format. Slices are
read, merged and written by one thread per tensor, so memory does not grow with the model. A merge into a Hugging Face
folder that is interrupted goes on where it was when it is started again; one into a Megatron checkpoint starts anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from copd_megatron.errors import ConfigError, WeightsError
from copd_megatron.weights.crew import ALONE, Crew, Failed
from copd_megatron.weights.hf import SHARD_BYTES, HfFolder
from copd_megatron.weights.hf_shards import Shard, plan_shards
from copd_megatron.weights.merge.checks import check_models, check_vocabularies
from copd_megatron.weights.merge.partial import PartialFolder
from copd_megatron.weights.merge.recipe import Recipe
from copd_megatron.weights.merge.report import write_report
from copd_megatron.weights.merge.rows import MergedRows
from copd_megatron.weights.merge.sources import open_source
from copd_megatron.weights.merge.stream import CHUNK
from copd_megatron.weights.merge.work import Merge, write_shards
from copd_megatron.weights.out_folder import open_place, refuse_small_disk
from copd_megatron.weights.progress import Progress

if TYPE_CHECKING:
    from copd_megatron.weights.megatron_writer import Record

logger = logging.getLogger(__name__)

_FORMAT = 1
"""Of what a merge computes: raised when the same recipe gives other bits, so that no shard of an older one is kept."""


def merge_folders(
    inputs: Sequence[Path],
    out: Path | None,
    base: Path,
    recipe: Recipe | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    jobs: int | None = None,
    report: Path | None = None,
    console: Console | None = None,
    crew: Crew = ALONE,
    trust: bool = False,
    chunk: int = CHUNK,
    megatron: Path | None = None,
) -> None:
    """Merge `inputs` by `recipe` (linear) into the Hugging Face folder `out`, in the form of `base`, the Megatron
    distributed checkpoint `megatron`, or both.

    Inputs are Hugging Face folders or Megatron distributed checkpoints, of any layouts; checkpoints without a valid
    manifest of ours are read only with `trust`, because their index is a pickle. The Hugging Face folder `base` gives
    the names, shapes, number formats, configuration and tokenizer. `jobs`: threads, by default one per core. `report`:
    where to write how the inputs differ, as JSON, with a picture beside it. `crew`: the processes that share the work,
    all of which call this with the same arguments. `chunk`: elements of a slice; no bit depends on it.

    Raises ConfigError for a recipe that does not fit the inputs; WeightsError, before any work is done, if an input is
    not a model of the same architecture, vocabulary and shapes as the base, the model is one that the policy does not
    know (`megatron`), an output has content and `overwrite` is off, or the disk is too small; and WeightsError if a
    model holds a value that is not finite. The outputs are then as they were.
    """
    recipe = recipe or Recipe()
    if out is None and megatron is None:
        raise ConfigError(
            "nothing to write: name a Hugging Face folder (-o), a Megatron checkpoint (--megatron) or both"
        )
    recipe.check_inputs(len(inputs))
    for place, marker in ((out, "config.json"), (megatron, "metadata.json")):
        if place is not None:
            open_place(place, marker, overwrite, crew)
    with ExitStack() as stack:
        reference = stack.enter_context(closing(open_source(base, crew=crew)))
        sources = [stack.enter_context(closing(open_source(path, base, trust, crew))) for path in inputs]
        merge = Merge(reference, sources, recipe, report is not None, chunk)
        crew.together(lambda: _check(merge, base, inputs))
        records = _megatron_records(base, crew) if megatron is not None else []
        forms = {name: reference.form(name) for name in sorted(reference.names())}
        shards = plan_shards(forms, max_shard_bytes) if out is not None else []
        partial = None if out is None else PartialFolder(out)
        needed = {partial.out: partial.bytes_to_come(shards)} if partial is not None else {}
        if megatron is not None:
            needed[megatron.absolute()] = sum(record.nbytes for record in records)
        crew.together(lambda: refuse_small_disk(needed) if crew.rank == 0 else None)
        logger.info("merging %s into %s by %s", ", ".join(map(str, inputs)), out or megatron, recipe)
        job = _Job(merge, base, crew, jobs or os.cpu_count() or 1, console, overwrite, report)
        try:
            if partial is not None:
                job.to_hf(partial, shards, max_shard_bytes, megatron, records)
            elif megatron is not None:
                job.to_megatron(megatron, records)
        except Failed as error:
            raise WeightsError(f"{out or megatron}: could not be written ({error}); it is as it was before") from error


class _Job:
    """A merge that has been checked. All methods are collective."""

    def __init__(
        self,
        merge: Merge,
        base: Path,
        crew: Crew,
        jobs: int,
        console: Console | None,
        overwrite: bool,
        report: Path | None,
    ) -> None:
        self._merge = merge
        self._base = base
        self._crew = crew
        self._jobs = jobs
        self._console = console
        self._overwrite = overwrite
        self._report = report

    def to_hf(
        self,
        folder: PartialFolder,
        shards: list[Shard],
        max_shard_bytes: int,
        megatron: Path | None,
        records: Sequence[Record],
    ) -> None:
        """Write `shards` and what belongs to them; and, from them, `records` as the checkpoint `megatron`.

        The Hugging Face folder gets its name last, so that whatever is interrupted goes on with its shards.
        """
        crew, merge = self._crew, self._merge
        everything = {
            "format": _FORMAT,
            "recipe": asdict(merge.recipe),
            "base": merge.base.identity(),
            "inputs": [source.identity() for source in merge.inputs],
            "max_shard_bytes": max_shard_bytes,
            "report": merge.measured,
        }
        with ExitStack() as stack:
            self._first(lambda: stack.enter_context(folder.held()))
            self._first(lambda: folder.begin(everything))
            mine = [shards[number] for number in crew.share([shard.nbytes for shard in shards])]
            crew.together(lambda: self._write(folder, mine))
            self._first(lambda: folder.furnish(shards, self._base))
            if megatron is not None:
                from copd_megatron.weights.convert import write_megatron

                source = crew.together(lambda: HfFolder(folder.path))
                write_megatron(source, records, megatron, self._overwrite, crew, console=self._console)
            self._first(lambda: self._write_report(folder.records(shards)))
            self._first(folder.complete)

    def to_megatron(self, megatron: Path, records: Sequence[Record]) -> None:
        """Write `records` as the checkpoint `megatron`, straight from the inputs."""
        from copd_megatron.weights.convert import write_megatron

        crew = self._crew
        rows = MergedRows(self._merge, self._jobs, crew.check)
        base = crew.together(lambda: HfFolder(self._base))
        write_megatron(base, records, megatron, self._overwrite, crew, rows, self._console)
        written = crew.gathered(rows.written)
        self._first(lambda: self._write_report({name: facts for part in written for name, facts in part.items()}))

    def _write(self, folder: PartialFolder, shards: list[Shard]) -> None:
        """Write those of this process's `shards` that are not there yet."""
        missing = [shard for shard in shards if folder.finished(shard) is None]
        total = sum(shard.nbytes for shard in shards)
        with Progress("merging", total, self._crew, self._console, len(shards)) as progress:
            for shard in shards:
                if shard not in missing:
                    progress.file(shard.file, shard.nbytes, kept=True)
            write_shards(self._merge, missing, folder, progress, self._jobs, self._crew.check)

    def _write_report(self, written: dict[str, Any]) -> None:
        if self._report is None:
            return
        measured = {name: facts["measured"] for name, facts in written.items() if "measured" in facts}
        labels = [source.label for source in self._merge.inputs]
        write_report(self._report, measured, self._merge.base.label, labels, self._merge.recipe)

    def _first(self, work: Callable[[], object]) -> None:
        """Have the first process do something that the others wait for."""
        self._crew.together(lambda: work() if self._crew.rank == 0 else None)


def _check(merge: Merge, base: Path, inputs: Sequence[Path]) -> None:
    """Refuse models that do not belong together."""
    check_models(merge.base, merge.inputs)
    check_vocabularies(base, inputs)
    merge.recipe.check_patterns(merge.base.names())


def _megatron_records(base: Path, crew: Crew) -> list[Record]:
    """What the checkpoint of a model like `base` will hold."""
    from copd_megatron.weights.convert import plan_megatron

    return plan_megatron(crew.together(lambda: HfFolder(base)), crew)
