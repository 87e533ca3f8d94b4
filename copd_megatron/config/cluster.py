"""Where a run's processes are: on this machine, or on the nodes of a Slurm job (docs/cluster.md)."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from copd_megatron.config.section import Section

RESERVED = (
    "array",
    "chdir",
    "exclusive",
    "job-name",
    "nodes",
    "ntasks",
    "open-mode",
    "output",
    "requeue",
    "signal",
    "time",
)
"""Options of sbatch that the rendered script decides itself."""


class ContainerConfig(Section):
    """The image that ranks and servers run in. The conductor, which talks to Slurm, stays outside."""

    image: str = Field(min_length=1)
    """What the runtime takes: an enroot image or `registry#name:tag` (pyxis), a .sif file (apptainer)."""
    runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """`pyxis`: Slurm's plugin, srun --container-image; `apptainer`: apptainer exec in every task."""
    mounts: tuple[str, ...] = ()
    """Further folders to see inside, HOST:CONTAINER or one path for both; the working folder, the run directory and the
    base are always mounted."""
    python: str = "python"
    """Python inside, with the same copd-megatron as outside."""


class ClusterConfig(Section):
    """Launching. The defaults are one machine, and need nothing from here."""

    launcher: Literal["local", "slurm"] = "local"
    """`slurm`: gangs and servers are steps of the Slurm job that `copd train` runs in (`copd launch --slurm`)."""
    nodes: int | dict[str, int] = 1
    """Nodes of each branch's policy: one number, or one by branch."""
    gpus_per_node: int = Field(0, ge=0)
    """GPUs of a node; 0: none, ranks are on CPUs."""
    placement: Literal["colocated", "disaggregated"] = "colocated"
    """Where a branch's servers are: on its policy's nodes (on the policy's GPUs if rollout.sglang.sleep, else on those
    that it leaves free), or on nodes of their own."""
    engine_nodes: int | dict[str, int] = 1
    """Under `disaggregated`: nodes of each branch's servers, beside those of its policy."""
    partition: str | None = None
    """sbatch --partition."""
    account: str | None = None
    """sbatch --account."""
    hours: float | None = Field(None, gt=0)
    """Time limit of the job (sbatch --time); without it the partition's."""
    options: tuple[str, ...] = ()
    """Further options of sbatch: ["--qos=high", "--gres=gpu:8"]."""
    node_options: dict[str, tuple[str, ...]] = Field({})
    """Options of sbatch for one branch's nodes, by branch, or `<branch>/engines` for those of its servers:
    {image: ["--constraint=h200"]}. With any, the job is a heterogeneous one, with a component per group of nodes."""
    interface: str | None = None
    """Network interface of all that branches, servers and ranks say to each other (NCCL_SOCKET_IFNAME,
    GLOO_SOCKET_IFNAME); without it addresses are those that Slurm knows the nodes by (NodeAddr)."""
    environment: dict[str, str] = Field({})
    """Environment variables of ranks and servers, e.g. {NCCL_IB_HCA: mlx5}. Nothing secret: it is in config.yaml."""
    container: ContainerConfig | None = None
    """An image for ranks and servers."""
    signal_seconds: int = Field(300, ge=10)
    """How long before its time limit, or its preemption, the job saves and is put into the queue again."""

    @model_validator(mode="after")
    def _sound(self) -> ClusterConfig:
        for key in ("nodes", "engine_nodes"):
            counts = getattr(self, key)
            for count in counts.values() if isinstance(counts, dict) else (counts,):
                if count < 1:
                    raise ValueError(f"{key}: {count} is not a number of nodes; give at least 1")
        by_group = {f"node_options.{name}": options for name, options in self.node_options.items()}
        for key, options in {"options": self.options, **by_group}.items():
            for option in options:
                name = option.removeprefix("--").split("=", 1)[0].split(" ", 1)[0]
                if not option.startswith("--") or "\n" in option:
                    raise ValueError(f"{key}: {option!r} must look like --qos=high")
                if name in RESERVED:
                    raise ValueError(f"{key}: {option!r} is decided by the script; reserved are {', '.join(RESERVED)}")
        for name in ("partition", "account", "interface"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w.,:@^=-]+", value):
                raise ValueError(f"{name}: {value!r} has characters that no such name has")
        return self

    def policy_nodes(self, branch: str) -> int:
        """Nodes of the branch's policy."""
        return _of(self.nodes, branch)

    def server_nodes(self, branch: str) -> int:
        """Nodes that the branch's servers have to themselves."""
        return _of(self.engine_nodes, branch) if self.placement == "disaggregated" else 0


def _of(counts: int | dict[str, int], branch: str) -> int:
    return counts[branch] if isinstance(counts, dict) else counts
