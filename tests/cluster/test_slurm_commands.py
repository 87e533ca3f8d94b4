"""The job as the environment describes it, and the srun commands made from it."""

from __future__ import annotations

from pathlib import Path

import pytest
from cluster_runs import described

from copd_megatron.cluster import slurm
from copd_megatron.cluster.placement import node_groups
from copd_megatron.cluster.site import environment_of_steps
from copd_megatron.config.cluster import ContainerConfig
from copd_megatron.errors import ConfigError, CopdError

NODELISTS = {"n[1-3]": ["n1", "n2", "n3"], "n[1-2]": ["n1", "n2"], "n3": ["n3"]}


@pytest.fixture(autouse=True)
def _hostnames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "hostnames", NODELISTS.__getitem__)


def test_nodes_of_a_job_are_given_out_in_order() -> None:
    groups = node_groups(described({"nodes": {"text": 2, "image": 1}}, worlds={"text": 2, "image": 1}))
    job = slurm.current(groups, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"})
    assert job.nodes == {"text": ("n1", "n2"), "image": ("n3",)}
    words = job.srun("text", ["n1", "n2"], 8, 8, Path("/run/rank_%t.txt"))
    assert words[0] == "srun"
    for word in (
        "--overlap", "--nodelist=n1,n2", "--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--gpus-per-node=8",
        "--gpu-bind=none", "--kill-on-bad-exit=1", "--output=/run/rank_%t.txt",
    ):  # fmt: skip
        assert word in words
    assert not any("het" in word for word in words)


def test_components_of_a_heterogeneous_job_are_the_groups_of_nodes() -> None:
    options = {"image": ["--constraint=h200"]}
    groups = node_groups(described({"nodes": {"text": 2, "image": 1}, "node_options": options}, {"text": 2}))
    environment = {"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n[1-2]"}
    job = slurm.current(groups, {**environment, "SLURM_JOB_NODELIST_HET_GROUP_1": "n3"})
    assert job.nodes == {"text": ("n1", "n2"), "image": ("n3",)}
    assert "--het-group=1" in job.srun("image", ["n3"], 1, 0)
    assert job.components_of(["n1", "n2", "n3"]) == [("text", ("n1", "n2")), ("image", ("n3",))]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "not inside a Slurm job. Submit it with `copd launch CONFIG --slurm`"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]"}, r"image gets 2, cluster wants 1 \(2 altogether\)"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n3"}, "image gets 0, cluster wants 1"),
        ({"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "3"}, "3 components, the run's groups of nodes are text, image"),
    ],
)
def test_another_job_than_the_run_asks_for_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        slurm.current(node_groups(described({})), environment)


def test_steps_have_options_of_their_own_and_the_interface() -> None:
    config = described({"interface": "ib0", "environment": {"NCCL_DEBUG": "WARN"}})
    before = {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "2",
        "SLURM_MEM_PER_CPU": "4",
        "SLURM_GPUS": "8",
        "RANK": "0",
    }
    assert environment_of_steps(config, before) == {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "NCCL_DEBUG": "WARN",
    }


def test_containers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    image = ContainerConfig(image="nvcr.io#team/copd:1", mounts=("/data", "/a:/b"))
    srun, command = slurm.of_container(image, ["/runs/x"])
    assert srun[:2] == ["--container-image=nvcr.io#team/copd:1", "--container-mounts=/runs/x:/runs/x,/data:/data,/a:/b"]
    assert f"--container-workdir={tmp_path}" in srun
    assert command == []
    srun, command = slurm.of_container(image.model_copy(update={"runtime": "apptainer"}), ["/runs/x"])
    assert srun == []
    assert command[:5] == ["apptainer", "exec", "--nv", "--pwd", str(tmp_path)]
    assert command[5:] == ["--bind", "/runs/x", "--bind", "/data", "--bind", "/a:/b", "nvcr.io#team/copd:1"]
    assert slurm.of_container(None, ["/runs/x"]) == ([], [])


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(CopdError, match="no-such-command-of-slurm: not found"):
        slurm.run("no-such-command-of-slurm")
    with pytest.raises(CopdError, match=r"ls /no/such/folder: .*No such file"):
        slurm.run("ls", "/no/such/folder")
