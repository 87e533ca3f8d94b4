"""`copd pilot`: do the runs that are missing, measure the models, then write the pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from copd_megatron.config import load_config
from copd_megatron.errors import CopdError, Interrupted
from copd_megatron.pilot.measure import Measuring
from copd_megatron.pilot.pages import write_pages
from copd_megatron.pilot.results import gather
from copd_megatron.pilot.runs import check_descriptions, do_missing
from copd_megatron.pilot.settings import PilotSettings


def pilot(config: Path, overrides: Sequence[str], console: Console, train: bool = True, ranks: int = 1) -> None:
    """Raises CopdError, after the pages are written, if a student has no gain; Interrupted, without pages, when the
    user stops it."""
    study = load_config(config, overrides, PilotSettings)
    check_descriptions(study)
    reasons = {}
    if train:
        reasons = do_missing(study, console, ranks)
        try:
            measure_missing(study, console)
        except KeyboardInterrupt as error:
            raise Interrupted("stopped while measuring; the same command goes on from there") from error
    result = gather(study, reasons)
    files = write_pages(study, result)
    console.print(f"pilot study: {files['html']}, {files['md']}, {files['json']}")
    if result.missing:
        lines = (f"seed {seed}, {updates} updates: {reason}" for (seed, updates), reason in result.missing.items())
        raise CopdError("the study is not whole:\n  " + "\n  ".join(lines))


def measure_missing(study: PilotSettings, console: Console) -> None:
    """Measure every model that is there and has not been measured."""
    teacher, student = study.teacher.capability, study.student.capability
    for seed in study.seeds:
        if not (study.model(seed, teacher, study.teacher.updates) / "config.json").exists():
            continue
        measuring = Measuring(study, seed)
        for capability in (teacher, student):
            for updates in study.measured(capability):
                there = (study.model(seed, capability, updates) / "config.json").exists()
                if there and measuring.measure(capability, updates):
                    console.print(f"{capability} model of {updates} updates, seed {seed}: measured")
