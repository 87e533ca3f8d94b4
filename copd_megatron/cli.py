"""The command line: `copd train | launch | sft | eval | convert | merge | compare | pilot | report | plan | status |
doctor`.

Exit codes: 0 done, 1 failed (the reason is printed last), 2 bad usage or configuration, 130 interrupted after a
checkpoint. Heavy libraries are imported by the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from copd_megatron.errors import ConfigError, CopdError, Interrupted
from copd_megatron.plan.options import plan

app = typer.Typer(
    name="copd",
    help="Co-Evolving Policy Distillation at Megatron scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
convert_app = typer.Typer(help="Hugging Face folder to Megatron checkpoint and back.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. rl.prompts=64")]

Ranks = Annotated[
    int, typer.Option(min=1, help="Runs go side by side while they have at most so many training processes together.")
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]


@app.command(epilog="Example: copd train configs/mini/text_image.yaml seed=1")
def train(
    config: Annotated[Path, typer.Argument(help="Run description (YAML).")],
    overrides: Overrides = None,
    resume_from: Annotated[
        int | None,
        typer.Option(help="Go on from the checkpoint of this step, and forget later ones; 0 is the base.", min=0),
    ] = None,
) -> None:
    """Train the branches, merge them, evaluate, report. Continues a run directory that has a checkpoint."""
    from copd_megatron.conductor import run
    from copd_megatron.config import RunConfig, load_config

    run(load_config(config, overrides or [], RunConfig), Console(), resume_from)


@app.command(epilog="Example: copd launch configs/mini/text_image.yaml --slurm --dry-run")
def launch(
    config: Annotated[Path, typer.Argument(help="Run description (YAML).")],
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="The same as cluster.launcher=slurm.")] = False,
    seeds: Annotated[str | None, typer.Option(help="A Slurm array with a run for each seed, e.g. 0,1,2.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the script and start nothing.")] = False,
) -> None:
    """Submit `copd train` to Slurm, on the nodes that `cluster` asks for; without Slurm run it here."""
    from copd_megatron.cluster.launch import launch as start

    raise typer.Exit(start(config, overrides or [], seeds, slurm, dry_run, Console()))


@app.command(epilog="Example: copd sft configs/mini/base.yaml seed=1")
def sft(
    config: Annotated[Path, typer.Argument(help="Description of the cold start (YAML).")], overrides: Overrides = None
) -> None:
    """Supervised cold start: a base that can do the tasks in part, so that rewards have something to find."""
    from copd_megatron.config import load_config
    from copd_megatron.sft import SftSettings, launch

    launch(load_config(config, overrides or [], SftSettings))


@app.command("eval", epilog="Example: copd eval runs/mini/text_image_seed0/merged --suite mini --json merged.json")
def evaluate(
    model: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    suite: Annotated[
        str, typer.Option(help="`mini`, `mini-video`, or a run description whose branches' test data are taken.")
    ] = "mini",
    n: Annotated[
        int, typer.Option(help="Samples per problem, where a benchmark does not say; 1 is greedy.", min=1)
    ] = 1,
    problems: Annotated[int, typer.Option(help="Problems per capability or benchmark.", min=1)] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of problems and samples.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the result here too.")] = None,
) -> None:
    """Accuracy of a model per capability, with 95% intervals."""
    from copd_megatron.evaluate.final import evaluate_folder

    evaluate_folder(model, suite, problems=problems, samples=n, seed=seed, out=json, console=Console())


@app.command(epilog="Example: copd merge branch_a/final branch_b/final --base base -o merged")
def merge(
    models: Annotated[
        list[Path], typer.Argument(help="Hugging Face folders, or Megatron distributed checkpoints, to merge.")
    ],
    base: Annotated[Path, typer.Option(help="The model they all come from; gives configuration and tokenizer.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Hugging Face folder to write.")] = None,
    megatron: Annotated[
        Path | None,
        typer.Option(help="Megatron distributed checkpoint to write, instead of -o or from the same merge."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="linear, slerp, task, ties, dare_linear, dare_ties, multislerp or karcher.")
    ] = "linear",
    weights: Annotated[str | None, typer.Option(help="One weight per model, e.g. 0.7,0.3; equal by default.")] = None,
    tensor_weights: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=WEIGHTS", help="Weights of some tensors, e.g. 'model.visual.*=0,1'; repeatable."),
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of changes kept (ties, dare); 0.5 by default.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the merged changes (task, ties, dare).")] = None,
    normalise: Annotated[
        bool | None, typer.Option("--normalise/--no-normalise", help="Divide by the sum of the weights.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare's choices.")] = 0,
    shard_megabytes: Annotated[float, typer.Option(help="Largest file, in MB (10⁶ bytes).", min=1e-3)] = 4e3,
    jobs: Annotated[int | None, typer.Option(help="Threads of each process; one per core by default.", min=1)] = None,
    report: Annotated[
        Path | None, typer.Option(help="Also write how the models differ: this .json file and a .png beside it.")
    ] = None,
    trust: Annotated[
        bool, typer.Option(help="Read Megatron checkpoints without a valid manifest; their index can run code.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Merge models of one base into one, as a Hugging Face folder (-o), a Megatron checkpoint (--megatron) or both.

    A merge into a folder that was interrupted goes on when it is started again.

    Under torchrun (`torchrun --nproc-per-node 4 --no-python copd merge ...`) the processes share the work.
    """
    from copd_megatron.weights.crew import started_crew
    from copd_megatron.weights.merge.folders import merge_folders
    from copd_megatron.weights.merge.recipe import Recipe

    recipe = Recipe(
        method=method,
        weights=_weights("--weights", weights),
        tensor_weights=tuple(_pattern(text) for text in tensor_weights or ()),
        density=density,
        scale=scale,
        normalise=normalise,
        seed=seed,
    )
    if report is not None and report.suffix != ".json":
        raise ConfigError(f"--report {report}: expected the name of a .json file; a picture is written beside it")
    console = Console()
    if not console.is_terminal:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    with started_crew() as crew:
        merge_folders(
            models,
            out,
            base,
            recipe,
            overwrite=overwrite,
            max_shard_bytes=int(shard_megabytes * 1e6),
            jobs=jobs,
            report=report,
            console=console,
            crew=crew,
            trust=trust,
            megatron=megatron,
        )
    if crew.rank == 0:
        console.print(
            f"merged {len(models)} models into {' and '.join(str(place) for place in (out, megatron) if place)}"
        )


@convert_app.command("to-megatron", epilog="Example: copd convert to-megatron base base_megatron")
def to_megatron(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    ckpt_dir: Annotated[Path, typer.Argument(help="Megatron distributed checkpoint to write.")],
    tp: Annotated[int, typer.Option(help="Refuse a model that so many tensor parallel ranks cannot share.")] = 1,
    pp: Annotated[int, typer.Option(help="The same for pipeline stages.")] = 1,
    vpp: Annotated[int, typer.Option(help="The same for virtual stages of each of them.")] = 1,
    ep: Annotated[int, typer.Option(help="The same for expert parallel ranks.")] = 1,
    etp: Annotated[int, typer.Option(help="The same for ranks that share an expert; 0: as tp.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Hugging Face folder to Megatron distributed checkpoint, which any parallel layout can load.

    Under torchrun (torchrun --nproc-per-node 8 -m copd_megatron.cli convert ...) the processes share the work.
    """
    from copd_megatron.weights import convert
    from copd_megatron.weights.crew import started_crew

    _log_to_stderr()
    with started_crew() as crew:
        convert.to_megatron(hf_dir, ckpt_dir, overwrite, convert.layout_of(tp, pp, vpp, ep, etp), crew)


@convert_app.command("to-hf", epilog="Example: copd convert to-hf base_megatron base_again")
def to_hf(
    ckpt_dir: Annotated[Path, typer.Argument(help="Megatron distributed checkpoint, of a run too.")],
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
    base: Annotated[
        Path | None,
        typer.Option(help="Folder with configuration, tokenizer and processor; by default the checkpoint's own hf/."),
    ] = None,
    max_shard_gb: Annotated[float, typer.Option(help="Largest weight file, in GB (10^9 bytes).", min=0.001)] = 4.0,
    trust: Annotated[
        bool, typer.Option("--trust", help="Read the pickled index without a valid manifest: it can run code.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Megatron distributed checkpoint, saved by any parallel layout, to Hugging Face folder.

    Under torchrun (torchrun --nproc-per-node 8 -m copd_megatron.cli convert ...) the processes share the work.
    """
    from copd_megatron.weights import convert
    from copd_megatron.weights.crew import started_crew

    _log_to_stderr()
    with started_crew() as crew:
        convert.to_hf(ckpt_dir, hf_dir, base, overwrite, int(max_shard_gb * 1e9), trust, crew)


@app.command(epilog="Example: copd report runs/mini/text_image_seed0")
def report(runs: Annotated[list[Path], typer.Argument(help="Run directories; several are drawn together.")]) -> None:
    """Write report.html, with plots, of a finished or running run."""
    from copd_megatron.observe.report import build_report

    for run in runs:
        if not (run / "config.yaml").exists():
            raise ConfigError(f"{run}: not a run directory (no config.yaml)")
    Console().print(f"report: {build_report(runs if len(runs) > 1 else runs[0])}")


@app.command(epilog="Example: copd status runs/mini/text_image_seed0")
def status(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Where a run stands and how its branches do, from its files: on any machine that sees them, without Slurm."""
    from copd_megatron.observe.status_page import status_page

    console = Console()
    for run in runs:
        console.print(status_page(run), soft_wrap=True)


@app.command(epilog="Example: copd compare configs/compare/two_branch.yaml --seeds 0,1,2")
def compare(
    config: Annotated[Path, typer.Argument(help="Description of the comparison (YAML).")],
    overrides: Overrides = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 0,1,2; by default those of the description.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Run this arm alone; repeatable. The table has all that are there.")
    ] = None,
    ranks: Ranks = 1,
    table: Annotated[bool, typer.Option("--table", help="Run nothing; write the table of what is there.")] = False,
) -> None:
    """Train methods side by side, then write the table with intervals. Goes on with what is missing.

    Ends with status 1 if a run has failed, or if rows that must be at equal budget are not.
    """
    from copd_megatron.compare.command import compare as do

    given = [*(overrides or []), *([f"seeds=[{seeds}]"] if seeds else [])]
    do(config, given, Console(), only=tuple(only or ()), train=not table, ranks=ranks)


@app.command(epilog="Example: copd pilot configs/pilot/mini.yaml --seeds 0")
def pilot(
    config: Annotated[Path, typer.Argument(help="Description of the study (YAML).")],
    overrides: Overrides = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 0,1; by default those of the description.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of everything; by default the description's.")] = None,
    ranks: Ranks = 1,
    table: Annotated[bool, typer.Option("--table", help="Run nothing; write the pages of what is there.")] = False,
) -> None:
    """One teacher, students at several distances from it: what each absorbs, and what predicts it.

    Goes on with what is missing. Ends with status 1 if a student could not be distilled.
    """
    from copd_megatron.pilot.command import pilot as do

    given = [*(overrides or []), *([f"seeds=[{seeds}]"] if seeds else []), *([f"out={out}"] if out else [])]
    do(config, given, Console(), train=not table, ranks=ranks)


app.command("plan", epilog="Example: copd plan configs/qwen3_vl_4b/nodes_80gb.yaml --gpu h100-80 --scale 8..16384")(
    plan
)


@app.command(epilog="Example: copd doctor")
def doctor() -> None:
    """What this machine can run, and why not."""
    from copd_megatron import doctor as examination

    Console().print(examination.render(examination.diagnose()))


def main() -> None:
    """Entry point of `copd`."""
    try:
        app(standalone_mode=True)
    except CopdError as error:
        print(error if isinstance(error, Interrupted) else f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


def _weights(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas, for example 0.7,0.3") from error


def _pattern(text: str) -> tuple[str, tuple[float, ...]]:
    pattern, _, numbers = text.rpartition("=")
    weights = _weights("--tensor-weights", numbers) if pattern else None
    if weights is None:
        raise ConfigError(f"--tensor-weights {text!r}: expected PATTERN=WEIGHTS, for example 'model.visual.*=0,1'")
    return pattern, weights


if __name__ == "__main__":
    main()
