"""Scripts that `copd launch` renders, what it refuses, and that none of it has a secret in it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster_runs import description
from rich.console import Console

from copd_megatron.cluster import launch as launching
from copd_megatron.cluster.launch import launch
from copd_megatron.config.engines import KEY_VARIABLE
from copd_megatron.errors import ConfigError, CopdError

CONFIGS = Path(__file__).parents[2] / "configs"
SECRET = "sk-4f1d-never-to-be-seen"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "job.yaml", {})


def write(file: Path, cluster: dict[str, Any], **changes: Any) -> Path:
    run_dir = {"seed": 0, "run_dir": "runs/x_seed${seed}"}
    file.write_text(yaml.safe_dump({**description(cluster), **run_dir, **changes}))
    return file


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The commands given to Slurm, which knows job 12 as waiting."""
    given: list[tuple[str, ...]] = []

    def run(*words: str) -> str:
        given.append(words)
        return {"sbatch": "12\n", "squeue": "12 PD\n"}[words[0]]

    monkeypatch.setattr(launching.slurm, "run", run)
    return given


def rendered(file: Path, *overrides: str, seeds: str | None = None) -> str:
    console = Console(width=60, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    assert launch(file, overrides, seeds, True, True, console) == 0
    script = console.export_text()
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


def options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_script_of_one_allocation(file: Path, tmp_path: Path) -> None:
    write(
        file,
        {"gpus_per_node": 8, "nodes": {"text": 2, "image": 1}, "partition": "h100", "account": "lab", "hours": 23.5},
        branches=[
            {"name": "text", "data": {"mini": {"modality": "text"}}, "parallel": {"world": 16}},
            {"name": "image", "data": {"mini": {"modality": "image"}}, "parallel": {"world": 8}},
        ],
    )
    script = rendered(file, "cluster.options=[--qos=high]", "cluster.signal_seconds=600")
    assert options(script) == [
        "--job-name=copd-x_seed0",
        f"--output={tmp_path}/runs/x_seed0/slurm/%j.out",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@600",
        "--time=1410",
        "--nodes=3",
        "--exclusive",
        "--partition=h100",
        "--account=lab",
        "--gpus-per-node=8",
        "--qos=high",
    ]
    assert f"run_dir={tmp_path}/runs/x_seed0\n" in script
    assert not (tmp_path / "runs").exists(), "a dry run touches nothing"


def test_different_kinds_of_nodes_are_components(file: Path) -> None:
    write(file, {"partition": "main", "node_options": {"image": ["--constraint=h200"]}})
    assert options(rendered(file))[5:] == [
        *["--nodes=1", "--exclusive", "--partition=main"],
        "hetjob",
        *["--nodes=1", "--exclusive", "--partition=main", "--constraint=h200"],
    ]
    with pytest.raises(ConfigError, match="no arrays of heterogeneous jobs"):
        rendered(file, seeds="0,1")


def test_an_array_has_a_run_directory_for_each_seed(file: Path, tmp_path: Path) -> None:
    script = rendered(file, seeds="3,5")
    assert "--array=3,5" in options(script)
    assert f"--output={tmp_path}/runs/x_seed3/slurm/%A_%a.out" in options(script)
    chosen = script[script.index("case") : script.index("export")] + "echo $run_dir"
    for seed in (3, 5):
        result = subprocess.run(
            ["bash", "-c", chosen], env={"SLURM_ARRAY_TASK_ID": str(seed)}, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == f"{tmp_path}/runs/x_seed{seed}"
    with pytest.raises(ConfigError, match=r"seeds 3 and 5 have the same run directory runs/one; put \$\{seed\} into"):
        rendered(file, "run_dir=runs/one", seeds="3,5")
    for wrong in ("a,b", "1,1", "-1"):
        with pytest.raises(ConfigError, match=r"--seeds '"):
            rendered(file, seeds=wrong)


def test_odd_names_stay_one_word(file: Path, tmp_path: Path) -> None:
    script = rendered(file, "run_dir=it's $(touch pwned)/x")
    line = next(line for line in script.splitlines() if line.startswith("run_dir="))
    result = subprocess.run(["bash", "-c", f'{line}; echo "$run_dir"'], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{tmp_path}/it's $(touch pwned)/x"
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(ConfigError, match=r"run_dir: .* has a newline"):
        rendered(file, 'run_dir="a\\n#SBATCH --uid=0"')


def test_submitting_freezes_the_configuration_and_is_not_done_twice(
    file: Path, tmp_path: Path, submitted: list[tuple[str, ...]]
) -> None:
    console = Console(quiet=True)
    assert launch(file, ["rl.group=6"], None, True, False, console) == 0
    run = tmp_path / "runs" / "x_seed0"
    assert submitted == [("sbatch", "--parsable", f"{Path('runs/x_seed0/slurm/copd.sbatch')}")]
    assert json.loads((run / "slurm" / "job.json").read_text()) == {"job": "12"}
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["rl"]["group"], saved["cluster"]["launcher"]) == (6, "slurm")
    with pytest.raises(CopdError, match="job 12 of this run is still queued or running; scancel 12"):
        launch(file, ["rl.group=6"], None, True, False, console)
    (run / "slurm" / "job.json").unlink()
    with pytest.raises(ConfigError, match="another configuration"):
        launch(file, ["rl.group=7"], None, True, False, console)


def test_one_machine_runs_it_here(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file, {"launcher": "local", "interface": "lo", "environment": {"NCCL_DEBUG": "WARN"}})
    ran: list[Any] = []
    finished = subprocess.CompletedProcess([], 130)
    monkeypatch.setattr(launching.subprocess, "run", lambda words, check: ran.append(words) or finished)
    assert launch(file, [], None, False, False, Console(quiet=True)) == 130
    script = (tmp_path / "runs" / "x_seed0" / "copd.sh").read_text()
    assert ran == [["bash", str(Path("runs/x_seed0/copd.sh"))]]
    assert "export GLOO_SOCKET_IFNAME=lo\n" in script
    assert "export NCCL_DEBUG=WARN\n" in script
    assert script.endswith(f"-m copd_megatron.cli train {tmp_path}/runs/x_seed0/config.yaml\n")
    with pytest.raises(ConfigError, match="one after another"):
        launch(file, [], "0,1", False, False, Console(quiet=True))


def test_no_file_of_a_launch_has_the_key(
    file: Path, tmp_path: Path, submitted: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    key = tmp_path / "key"
    key.write_text(SECRET)
    key.chmod(stat.S_IRUSR)
    urls = {name: ["http://10.0.0.1:3000"] for name in ("text", "image", "base")}
    write(file, {}, rollout={"engine": "sglang", "sglang": {"urls": urls, "api_key_file": str(key)}})
    assert SECRET not in rendered(file)
    console = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    launch(file, [], None, True, False, console)
    assert SECRET not in console.export_text() + str(submitted)
    holders = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]
    assert holders == [key]


@pytest.mark.parametrize(
    "file", sorted(CONFIGS.glob("qwen3_vl_*/*.yaml")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_shipped_configurations_of_clusters_can_be_submitted(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    cluster, servers = settings["cluster"], settings["rollout"]["sglang"]
    branches = len(settings["branches"])
    gpus = branches * settings["branches"][0]["parallel"]["world"]
    if cluster["placement"] == "disaggregated":
        gpus += branches * servers["servers"] * servers["tensor_parallel"]
    script = rendered(file)
    assert f"#SBATCH --nodes={gpus // 8}\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
