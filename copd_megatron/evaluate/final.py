"""The table at the end of a run, and `copd eval`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from copd_megatron.config import RunConfig, load_config
from copd_megatron.data.mini import MiniTask
from copd_megatron.errors import ConfigError
from copd_megatron.evaluate.model import EvalSettings, evaluate_model
from copd_megatron.evaluate.suites import MODALITIES, Suite, describe, mini_suites, run_suites
from copd_megatron.evaluate.table import AccuracyTable
from copd_megatron.files import write_atomic
from copd_megatron.rewards.pool import RewardPool

if TYPE_CHECKING:
    from rich.console import Console

    from copd_megatron.run_folder import RunFolder

logger = logging.getLogger(__name__)


def evaluate_run(config: RunConfig, folder: RunFolder, console: Console) -> None:
    """Evaluate the run's models on its branches' test data; write `evaluation.json` and `outcomes.json` and print the
    table."""
    suites = run_suites(config, config.seed, config.eval.problems)
    if not suites:
        console.print("no branch has test data: nothing is evaluated")
        return
    models: dict[str, Path] = {}
    if "base" in config.eval.models:
        models["base"] = Path(config.base)
    if "branches" in config.eval.models:
        models |= {f"{branch.name} branch": folder.final(branch.name) for branch in config.trained}
    if "merged" in config.eval.models and len(config.trained) > 1:
        models["merged"] = folder.merged
    settings = eval_settings(config, config.eval.samples, config.seed)
    pool = RewardPool(config.data.reward_workers, config.data.reward_seconds)
    table = _evaluate(models, suites, describe(config), settings, pool, notes=(f"method {config.method}",))
    write_atomic(folder.outcomes, json.dumps(table.outcomes(), separators=(",", ":")) + "\n")
    write_atomic(folder.evaluation, json.dumps(table.json(), indent=1) + "\n")
    console.print(table.rich())


def evaluate_folder(
    model: Path, suite: str, *, problems: int, samples: int, seed: int, out: Path | None, console: Console
) -> None:
    """Evaluate one Hugging Face folder on `suite`, a name in `suites.MODALITIES` or the file of a run description, and
    print the table.

    Raises ConfigError for a suite that is neither or has no test data, WeightsError for an unusable folder.
    """
    if suite in MODALITIES:
        task = MiniTask()
        suites = mini_suites(task, MODALITIES[suite], seed, problems)
        line = task.describe(MODALITIES[suite])
        # The digits as read, `>`, at most as many digits again, end of turn; a digit more each shows overlong answers.
        settings = EvalSettings(samples, max_new_tokens=2 * task.digits + 4, max_prompt_tokens=1024, seed=seed)
        pool = RewardPool()
    else:
        if not Path(suite).is_file():
            raise ConfigError(
                f"--suite {suite}: neither {' nor '.join(map(repr, MODALITIES))} nor a file; give a run description, "
                "configs/….yaml"
            )
        config = load_config(suite, [], RunConfig)
        suites = run_suites(config, seed, problems)
        if not suites:
            raise ConfigError(f"{suite}: none of its branches has test data; set branches[…].data.test or .benchmarks")
        line = describe(config)
        settings = eval_settings(config, samples, seed)
        pool = RewardPool(config.data.reward_workers, config.data.reward_seconds)
    table = _evaluate({str(model): model}, suites, line, settings, pool)
    console.print(table.rich())
    if (breakdown := table.breakdown()) is not None:
        console.print(breakdown)
    if out is not None:
        write_atomic(out, json.dumps(table.json(), indent=1) + "\n")


def eval_settings(config: RunConfig, samples: int, seed: int) -> EvalSettings:
    """How a run's models are asked."""
    return EvalSettings(
        samples=samples,
        max_new_tokens=config.rollout.max_new_tokens,
        max_prompt_tokens=config.data.max_prompt_tokens,
        seed=seed,
        temperature=config.rollout.temperature,
        max_rows=config.rollout.max_rows,
    )


def _evaluate(
    models: Mapping[str, Path],
    suites: list[Suite],
    task: str,
    settings: EvalSettings,
    pool: RewardPool,
    notes: tuple[str, ...] = (),
) -> AccuracyTable:
    results = []
    with pool:
        for name, model_dir in models.items():
            results.append(evaluate_model(name, model_dir, suites, settings, pool))
            logger.info("evaluated %s: overall %.4f", name, results[-1].overall.accuracy)
    return AccuracyTable(task, tuple(results), settings.samples, settings.seed, notes)
