"""The whole run description."""

from __future__ import annotations

from typing import get_args

from pydantic import Field, model_validator

from copd_kernels.arguments import MAX_K
from copd_megatron.cluster import placement
from copd_megatron.config import methods
from copd_megatron.config.branches import BranchConfig, DataConfig, Topology
from copd_megatron.config.cluster import ClusterConfig
from copd_megatron.config.engines import BASE, RolloutConfig, frozen_group
from copd_megatron.config.rhythm import RhythmConfig
from copd_megatron.config.section import Section
from copd_megatron.config.supervision import SupervisionConfig
from copd_megatron.config.training import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    MergeConfig,
    OPDConfig,
    PrecisionConfig,
    RLConfig,
    TeacherConfig,
)
from copd_megatron.errors import ConfigError
from copd_megatron.objectives.settings import FullLoss
from copd_megatron.policy.optimizer import OptimizerSettings
from copd_megatron.topology import PRESETS, edges_of

FULL_LOSSES = get_args(FullLoss)


class RunConfig(Section):
    """A training run. Only `base` and `branches` have no default."""

    base: str
    """Hugging Face folder of the model that every branch starts from."""
    branches: tuple[BranchConfig, ...] = Field(min_length=1)
    """The branches, one per capability."""
    seed: int = 0
    """Seed of every random choice."""
    run_dir: str = "runs/copd"
    """Folder of everything the run writes; an existing one is continued."""
    method: methods.Method = "copd"
    """`copd`, or something to compare it with. `merge_only`: the same branches, never taught by each other, averaged at
    the end. `expert`: the branch `student` alone. `mixed`: one model on all branches' data. `static_opd`: the expert of
    `student` learns from the finished experts that teach it by the topology. `mopd`: a model that starts from the base
    learns from all finished experts."""
    student: str | None = None
    """Under `expert` and `static_opd`: the branch that is trained."""
    experts: dict[str, str] = Field({})
    """Under `static_opd` and `mopd`: Hugging Face folder of each branch's finished expert, from another run."""
    topology: Topology = "pair"
    """Who teaches whom: a preset (pair, hub, mesh, ring, none; `hub` takes the first branch as hub), {hub: NAME}, or a
    list of {student, teacher}."""
    rhythm: RhythmConfig = RhythmConfig()
    """When a phase ends."""
    rl: RLConfig = RLConfig()
    """Reinforcement learning with verifiable rewards."""
    opd: OPDConfig = OPDConfig()
    """On-policy distillation between branches."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """AdamW and its learning rate."""
    precision: PrecisionConfig = PrecisionConfig()
    """Number formats and micro-batch size."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling."""
    teacher: TeacherConfig = TeacherConfig()
    """Where teachers are, and how current."""
    merge: MergeConfig = MergeConfig()
    """The final merge."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    supervision: SupervisionConfig = SupervisionConfig()
    """What counts as a failure, and how often the run goes on by itself after one."""
    data: DataConfig = DataConfig()
    """Common data settings."""
    eval: EvalConfig = EvalConfig()
    """The final table."""
    log: LogConfig = LogConfig()
    """Measurements along the way."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the run's processes are."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        names = [branch.name for branch in self.branches]
        if len(set(names)) != len(names):
            raise ValueError(f"branches: names must differ, found {names}")
        edges_of(self.topology, names)
        methods.check(self)
        trained_on = [one.name for one in self.branches if one.data.mini is None and one.data.validation is None]
        if self.eval.split == "validation" and trained_on:
            raise ValueError(
                f"eval.split = validation: {', '.join(trained_on)} have no data.validation, and would be evaluated on "
                "what they were trained on"
            )
        names = [branch.name for branch in self.trained]
        if self.log.overlap_k > self.opd.top_k:
            raise ValueError(
                f"log.overlap_k = {self.log.overlap_k} needs as many of the teacher's tokens: raise opd.top_k = "
                f"{self.opd.top_k} or lower log.overlap_k"
            )
        if len(names) > 1:
            try:
                self.merge.recipe(names, self.seed)
            except ConfigError as error:
                raise ValueError(f"merge: {error}") from error
        self._teachers()
        if self.rollout.engine == "sglang":
            self._servers(names)
        if self.cluster.launcher == "slurm":
            try:
                placement.check(self)
            except ConfigError as error:
                raise ValueError(str(error)) from error
        longest = self.data.max_prompt_tokens + self.rollout.max_new_tokens
        if longest > self.precision.max_tokens_per_microbatch:
            raise ValueError(
                f"precision.max_tokens_per_microbatch = {self.precision.max_tokens_per_microbatch} does not hold the "
                f"longest sequence: raise it to {longest}, or lower data.max_prompt_tokens = "
                f"{self.data.max_prompt_tokens} or rollout.max_new_tokens = {self.rollout.max_new_tokens}"
            )
        for branch in self.trained:
            replicas = branch.parallel.layout().dp
            for key, prompts in {
                "rl.prompts": self.rl.prompts,
                "opd.native_prompts": self.native_prompts,
                "opd.cross_prompts": self.cross_prompts,
            }.items():
                if prompts % replicas:
                    raise ValueError(
                        f"{key} = {prompts} is not a multiple of the {replicas} data-parallel ranks of "
                        f"branch {branch.name}"
                    )
            if not all(lessons := self.lessons(branch.name).values()):
                raise ValueError(
                    f"opd.cross_prompts = {self.cross_prompts} do not give each of the {len(lessons)} teachers of "
                    f"{branch.name} a prompt on each of its {replicas} data-parallel ranks: raise it to "
                    f"{len(lessons) * replicas}"
                )
        return self

    def _teachers(self) -> None:
        if self.teacher.where == "engine":
            if self.opd.loss in FULL_LOSSES:
                raise ValueError(
                    f"opd.loss = {self.opd.loss} needs the teacher's logits over the whole vocabulary, which no engine "
                    "gives: set teacher.where = resident, or take a loss on the teacher's top-k"
                )
            return
        if self.opd.top_k > MAX_K:
            raise ValueError(
                f"opd.top_k = {self.opd.top_k}: a resident teacher gives at most {MAX_K} tokens; lower it, or take "
                "opd.loss = full_reverse, full_forward or full_jsd for the whole vocabulary"
            )
        if self.precision.fp8 == "delayed":
            raise ValueError(
                "precision.fp8 = delayed scales by what earlier passes have seen, and a resident teacher has had none "
                "with its weights: use fp8 = tensorwise or blockwise, or teacher.where = engine"
            )

    def _servers(self, names: list[str]) -> None:
        urls = self.rollout.sglang.urls
        wanted = self.server_groups
        if urls and (missing := [name for name in wanted if not urls.get(name)]):
            raise ValueError(
                f"rollout.sglang.urls: no servers for {', '.join(missing)}; servers of the base are not needed with "
                "log.kl_to_base = false"
            )
        if unknown := sorted(set(urls) - set(wanted)):
            raise ValueError(f"rollout.sglang.urls: {', '.join(unknown)} is none of {', '.join(wanted)}")
        if BASE in names:
            raise ValueError(f"branches: with rollout.engine = sglang no branch can be called {BASE!r}")

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """(student, teacher) pairs in force."""
        return methods.edges(self)

    @property
    def trained(self) -> tuple[BranchConfig, ...]:
        """The branches that get a gang; with one alone nothing is merged."""
        return methods.trained(self)

    @property
    def frozen(self) -> dict[str, str]:
        """Folders of the teachers that are finished experts; empty where teachers are trained themselves."""
        if self.method not in methods.DISTILLING:
            return {}
        return {teacher: self.experts[teacher] for _, teacher in self.edges}

    def start(self, name: str) -> str:
        """The folder that a trained branch starts from."""
        return self.experts[name] if self.method == "static_opd" else self.base

    @property
    def server_groups(self) -> tuple[str, ...]:
        """What each group of SGLang servers is called: a branch, a teacher that a phase keeps as it was, the base."""
        keeps = self.teacher.refresh == "phase" and self.teacher.where == "engine"
        teachers = {teacher for _, teacher in self.edges} if keeps else set()
        return (
            *(branch.name for branch in self.trained),
            *(frozen_group(branch.name) for branch in self.trained if branch.name in teachers),
            *([BASE] if self.log.kl_to_base else []),
        )

    @property
    def native_prompts(self) -> int:
        """Own prompts of a Phase II step."""
        if self.opd.native_prompts is not None:
            return self.opd.native_prompts
        return 0 if self.method in methods.DISTILLING else self.rl.prompts

    @property
    def cross_prompts(self) -> int:
        """Prompts of the teachers' capabilities in a Phase II step of a branch."""
        return self.opd.cross_prompts or self.rl.prompts

    def lessons(self, student: str) -> dict[str, int]:
        """Prompts of each teacher's capability in a Phase II step of `student`.

        `cross_prompts` are dealt out in whole rounds of the student's data-parallel ranks, so that a branch makes as
        many rollouts with two teachers as with one; what is left over goes to the first of them.
        """
        teachers = [teacher for name, teacher in self.edges if name == student]
        replicas = self.branch(student).parallel.layout().dp
        rounds = self.cross_prompts // replicas
        return {
            teacher: replicas * (rounds // len(teachers) + (number < rounds % len(teachers)))
            for number, teacher in enumerate(teachers)
        }

    def branch(self, name: str) -> BranchConfig:
        """The branch called `name`."""
        return next(branch for branch in (*self.branches, *self.trained) if branch.name == name)


__all__ = ["PRESETS", "RunConfig"]
