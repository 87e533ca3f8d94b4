from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from copd_megatron.config import RunConfig, load_config
from copd_megatron.data.mini import MiniTask
from copd_megatron.data.mini.model import build
from copd_megatron.errors import ConfigError, DataError
from copd_megatron.evaluate import final
from copd_megatron.evaluate.final import evaluate_folder, evaluate_run
from copd_megatron.evaluate.model import EvalSettings, evaluate_model
from copd_megatron.evaluate.suites import MODALITIES, Suite, mini_operation, mini_suites, run_suites
from copd_megatron.observe.results import read_evaluation
from copd_megatron.rewards.digits import digits
from copd_megatron.rewards.verdict import Unparsable, Verdict
from copd_megatron.run_folder import RunFolder


class InProcessPool:
    """The verifier of the mini suite without worker processes."""

    def __init__(self, *_: object) -> None: ...

    def __enter__(self) -> InProcessPool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def score(self, items: Sequence[tuple[str, str, str]]) -> list[Verdict]:
        verdicts = []
        for verifier, response, answer in items:
            assert verifier == "digits"
            try:
                verdicts.append(Verdict(digits(response, answer), "ok"))
            except Unparsable:
                verdicts.append(Verdict(0.0, "unparsable"))
        return verdicts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained mini model."""
    folder = tmp_path_factory.mktemp("mini") / "base"
    build(folder, seed=0)
    return folder


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def config_file(model: Path, tmp_path: Path) -> Path:
    """A run description with two branches of the mini suite."""
    description = {
        "base": str(model),
        "run_dir": str(tmp_path / "run"),
        "seed": 5,
        "branches": [
            {"name": "text", "data": {"mini": {"modality": "text"}}},
            {"name": "image", "data": {"mini": {"modality": "image"}}},
        ],
        "rollout": {"max_new_tokens": 4},
        "data": {"max_prompt_tokens": 64},
        "eval": {"problems": 12},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    return tmp_path / "run.yaml"


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_mini_suite_is_asked_and_judged_for_real(model: Path, console: Console, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    evaluate_folder(model, "mini", problems=12, samples=1, seed=0, out=out, console=console)
    written = json.loads(out.read_text())
    assert set(written["models"][0]["capabilities"]) == {"text", "image"}
    for detail in written["models"][0]["capabilities"].values():
        assert detail["n"] == sum(detail["verdicts"].values()) == 12
        assert sum(estimate["trials"] for estimate in detail["groups"].values()) == 12
    assert MiniTask().describe()[:60] in shown(console)
    assert "image srt" in shown(console)


def test_a_run_is_evaluated_at_all_its_models(
    model: Path, config_file: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final, "RewardPool", InProcessPool)
    config = load_config(config_file, [], RunConfig)
    folder = RunFolder(config.run_dir)
    folder.open(config)
    for copy in (folder.final("text"), folder.final("image"), folder.merged):
        shutil.copytree(model, copy)
    evaluate_run(config, folder, console)
    evaluation = read_evaluation(folder.path)
    assert evaluation is not None
    assert [found.name for found in evaluation.models] == ["base", "text branch", "image branch", "merged"]
    assert (evaluation.n, evaluation.seed) == (12, 5)
    # Equal weights give equal answers to equal questions.
    assert len({json.dumps(found.model_dump(exclude={"name"})) for found in evaluation.models}) == 1
    assert "merged" in shown(console)


def test_only_the_models_asked_for_are_evaluated(
    config_file: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final, "RewardPool", InProcessPool)
    config = load_config(config_file, ["eval.models=[base]", "eval.samples=3"], RunConfig)
    folder = RunFolder(config.run_dir)
    folder.open(config)
    evaluate_run(config, folder, console)
    evaluation = read_evaluation(folder.path)
    assert evaluation is not None
    assert [found.name for found in evaluation.models] == ["base"]
    assert any("avg@3" in note for note in evaluation.notes)


def test_a_suite_that_is_neither_known_nor_a_file_is_refused(model: Path, console: Console) -> None:
    with pytest.raises(ConfigError, match="--suite maxi: neither 'mini' nor 'mini-video' nor a file"):
        evaluate_folder(model, "maxi", problems=4, samples=1, seed=0, out=None, console=console)


def test_branches_without_test_data_are_not_evaluated(model: Path, tmp_path: Path, console: Console) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "sum 12=", "answer": "3"}\n')
    source = {"path": str(tmp_path / "train.jsonl"), "verifier": "digits"}
    description = {"base": str(model), "branches": [{"name": "text", "data": {"train": source}}], "topology": "none"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    with pytest.raises(ConfigError, match="none of its branches has test data"):
        evaluate_folder(model, str(tmp_path / "run.yaml"), problems=4, samples=1, seed=0, out=None, console=console)


def test_problems_of_a_file_are_asked_once_each(model: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"sum {number}=", "answer": "3"}) for number in (12, 21, 30)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    source = {"path": str(tmp_path / "data.jsonl"), "verifier": "digits"}
    description = {
        "base": str(model),
        "branches": [{"name": "text", "data": {"train": source, "test": source}}],
        "topology": "none",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(description))
    suites = run_suites(load_config(tmp_path / "run.yaml", [], RunConfig), seed=0, problems=1024)
    assert [(suite.capability, suite.size) for suite in suites] == [("text", 3)]
    settings = EvalSettings(samples=2, max_new_tokens=3, max_prompt_tokens=64, seed=0)
    result = evaluate_model("base", model, suites, settings, InProcessPool()).benchmarks[0]
    assert (result.problems, result.samples, sum(result.verdicts.values())) == (3, 2, 6)


def several_benchmarks(model: Path, folder: Path) -> Path:
    """A run whose branch has two benchmarks, one of them with samples of its own; its training data are not there."""
    for name, count in (("easy", 3), ("hard", 2)):
        lines = [json.dumps({"prompt": f"sum {number}{number}=", "answer": "3"}) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    benchmarks = {
        "easy": {"path": str(folder / "easy.jsonl"), "verifier": "digits"},
        "hard": {"path": str(folder / "hard.jsonl"), "verifier": "digits", "samples": 4},
    }
    data = {"train": {"path": str(folder / "absent.jsonl"), "verifier": "digits"}, "benchmarks": benchmarks}
    description = {"base": str(model), "branches": [{"name": "text", "data": data}], "topology": "none",
                   "data": {"max_prompt_tokens": 64}, "rollout": {"max_new_tokens": 3}}  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(description))
    return folder / "run.yaml"


def test_benchmarks_have_samples_and_results_of_their_own(
    model: Path, tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final, "RewardPool", InProcessPool)
    suite, out = several_benchmarks(model, tmp_path), tmp_path / "result.json"
    evaluate_folder(model, str(suite), problems=9, samples=1, seed=0, out=out, console=console)
    text = json.loads(out.read_text())["models"][0]["capabilities"]["text"]
    assert {name: (part["n"], part["samples"]) for name, part in text["benchmarks"].items()} == {
        "easy": (3, 1),
        "hard": (2, 4),
    }
    assert "text/hard" in shown(console)
    assert "easy.jsonl, hard" in shown(console)
    suites = run_suites(load_config(suite, [], RunConfig), seed=0, problems=2)
    assert [(one.name, one.size, one.samples) for one in suites] == [("text/easy", 2, None), ("text/hard", 2, 4)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["branches.0.data.test={path: a.jsonl, verifier: digits}"], "give either `test`, .* or `benchmarks`"),
        (
            ["branches.0.data.benchmarks.easy.sample=3"],
            r"benchmarks\.easy\.sample: unknown key; did you mean 'samples'",
        ),
        (["branches.0.data.benchmarks.easy.samples=0"], r"benchmarks\.easy\.samples: .*greater than or equal to 1"),
        (["branches.0.data.benchmarks={a/b: {path: a.jsonl, verifier: digits}}"], "benchmarks.*should match pattern"),
        (
            ["branches.0.data.train=null", "branches.0.data.mini={modality: text}"],
            "`mini` has test problems of its own",
        ),
    ],
)
def test_mistakes_in_benchmarks_are_refused(model: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(several_benchmarks(model, tmp_path), overrides, RunConfig)


def test_settings_are_chosen_on_validation_problems(config_file: Path, console: Console, monkeypatch) -> None:
    monkeypatch.setattr(final, "RewardPool", InProcessPool)
    asked = {}
    for split in ("test", "validation"):
        config = load_config(config_file, [f"eval.split={split}", "eval.models=[base]"], RunConfig)
        asked[split] = [suite.source[index].uid for suite in run_suites(config, 5, 12) for index in range(suite.size)]
        folder = RunFolder(Path(config.run_dir).with_name(split))
        folder.path.mkdir()
        evaluate_run(config, folder, console)
        assert ("VALIDATION problems" in folder.evaluation.read_text()) == (split == "validation")
    assert [len(uids) for uids in asked.values()] == [24, 24]
    assert all(f"/{split}/" in uid for split, uids in asked.items() for uid in uids)


def test_training_problems_are_not_taken_for_validation(config_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"eval\.split = validation: text have no data\.validation"):
        load_config(
            config_file,
            [
                "branches.0.data.mini=null",
                "branches.0.data.train={path: a.jsonl, verifier: digits}",
                "eval.split=validation",
            ],
            RunConfig,
        )


def test_one_sample_is_greedy_and_several_are_drawn_at_the_temperature() -> None:
    one = EvalSettings(samples=1, max_new_tokens=3, max_prompt_tokens=64, seed=0, temperature=0.7)
    assert (one.sampling((54,)).n, one.sampling((54,)).temperature) == (1, 0.0)
    four = replace(one, samples=4)
    assert (four.sampling((54,)).n, four.sampling((54,)).temperature) == (4, 0.7)


def test_problems_that_cannot_be_asked_are_counted(model: Path) -> None:
    text, image = mini_suites(MiniTask(), MODALITIES["mini"], seed=0, problems=8)
    short = EvalSettings(samples=1, max_new_tokens=3, max_prompt_tokens=17, seed=0)
    found = evaluate_model("base", model, [text], short, InProcessPool()).benchmarks[0]
    assert (found.problems, found.refused) == (8, 0)
    with pytest.raises(DataError, match=r"image: none of 8 problems can be used; first: .*prompt too long"):
        evaluate_model("base", model, [image], short, InProcessPool())
    mixed = Suite("both", [*(text.source[i] for i in range(5)), *(image.source[i] for i in range(3))], 8)  # type: ignore[arg-type]
    found = evaluate_model("base", model, [mixed], short, InProcessPool()).benchmarks[0]
    assert (found.problems, found.refused) == (5, 3)


def test_the_operation_of_a_mini_problem_is_found(model: Path) -> None:
    from copd_megatron.data.prompts import PromptBuilder, load_processor

    builder = PromptBuilder(load_processor(model), 128)
    task = MiniTask(operations=("dif",), video_operations=("dif",))
    for suite in mini_suites(task, MODALITIES["mini-video"], seed=0, problems=3):
        prompts, _ = builder.build_many([suite.source[index] for index in range(3)], suite.capability)
        assert [mini_operation(prompt) for prompt in prompts] == ["dif"] * 3
