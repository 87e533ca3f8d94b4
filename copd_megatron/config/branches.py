"""Branches: what each one learns from and how its gang of processes is laid out; and who teaches whom."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from copd_megatron.config.section import Section
from copd_megatron.data.mini import MiniTask
from copd_megatron.data.mini.task import Modality
from copd_megatron.data.settings import SourceSettings
from copd_megatron.errors import ConfigError
from copd_megatron.policy.degrees import Layout


class MiniData(Section):
    """One modality of the procedural mini suite; its difficulty is `data.mini`, shared by all branches."""

    modality: Modality
    """Digits as a string, handwritten digits composed into a picture, or in a video one after another."""


class BenchmarkConfig(SourceSettings):
    """Test problems that are averaged on their own."""

    samples: int | None = Field(None, ge=1)
    """Samples per problem (avg@n), 1 is greedy; `eval.samples` where it is absent."""


class BranchData(Section):
    """Where a branch's prompts come from: the mini suite, or files and data sets of one's own."""

    mini: MiniData | None = None
    """A modality of the mini suite, which brings its own train, validation and test splits."""
    train: SourceSettings | None = None
    """Prompts that the branch is trained on."""
    validation: SourceSettings | None = None
    """Prompts on which drift between branches is measured; the training prompts where it is absent."""
    test: SourceSettings | None = None
    """Problems of the final table; the branch has no column there without `test` and `benchmarks`."""
    benchmarks: dict[Annotated[str, Field(pattern=r"^[\w+-][\w +()-]*$")], BenchmarkConfig] = Field({})
    """Several such sets of problems by name, instead of `test`: the accuracy of the branch's capability is their
    unweighted mean, and *overall* that of the benchmarks of all branches."""
    mixture: tuple[BranchData, ...] = ()
    """Several such data at once, all examples of each; it has no test problems of its own."""

    @model_validator(mode="after")
    def _one_origin(self) -> BranchData:
        if [self.mini is None, self.train is None, not self.mixture].count(False) != 1:
            raise ValueError("give either `mini` or `train` (or a `mixture` of such), not both and not neither")
        if self.test is not None and self.benchmarks:
            raise ValueError("give either `test`, one set of problems, or `benchmarks`, several by name, not both")
        if self.benchmarks and self.train is None:
            raise ValueError("`benchmarks` are beside `train`: `mini` has test problems of its own, a `mixture` none")
        return self


class Parallel(Section):
    """The gang of one branch: how many processes, and how Megatron divides the model over them.

    Data parallelism is what tp × pp × cp leave over of `world`.
    """

    world: int = Field(1, ge=1)
    """Processes in the gang."""
    tp: int = Field(1, ge=1)
    """Tensor parallel degree: every matrix is divided."""
    pp: int = Field(1, ge=1)
    """Pipeline parallel degree: the layers are divided."""
    vpp: int = Field(1, ge=1)
    """Virtual pipeline stages per process, which shorten the pipeline's start and end."""
    cp: int = Field(1, ge=1)
    """Context parallel degree: the tokens of a micro-batch are divided."""
    ep: int = Field(1, ge=1)
    """Expert parallel degree: the experts are divided among replicas."""
    etp: int = Field(0, ge=0)
    """Tensor parallel degree of each expert; 0: as tp."""
    sequence_parallel: bool = False
    """Divide norms and residuals too, by token; needs tp of at least 2."""

    @model_validator(mode="after")
    def _divides(self) -> Parallel:
        try:
            self.layout()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def layout(self) -> Layout:
        """The degrees as the policy takes them."""
        return Layout(**self.model_dump())


class BranchConfig(Section):
    """One branch: a capability of its own, trained by a gang of its own."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$")
    """Name of the branch and of its capability."""
    data: BranchData
    """Its prompts."""
    parallel: Parallel = Parallel()
    """Its gang."""


class Edge(Section):
    """A directed edge: `student` learns from `teacher`."""

    student: str
    """The branch that samples and is updated."""
    teacher: str
    """The branch whose engine scores the samples, on prompts of the teacher's own capability."""


class Hub(Section):
    """Hub and spokes: every other branch exchanges with `hub` in both directions."""

    hub: str
    """The branch in the middle."""


def _form(topology: Any) -> str:
    if isinstance(topology, dict | Hub):
        return "hub"
    return "preset" if isinstance(topology, str) else "edges"


Topology = Annotated[
    Annotated[str, Tag("preset")] | Annotated[Hub, Tag("hub")] | Annotated[tuple[Edge, ...], Tag("edges")],
    Discriminator(_form),
]
"""Told apart by their form, so that a mistake in one is not reported as a mistake in all three."""


class DataConfig(Section):
    """What all branches' data have in common."""

    mini: MiniTask = MiniTask()
    """Difficulty and conventions of the mini suite (`data.mini` branches only)."""
    mini_size: int = Field(100_000, ge=1)
    """Virtual number of examples in the mini suite's training split."""
    max_prompt_tokens: int = Field(16_384, ge=1)
    """Longer prompts, image tokens included, are refused."""
    on_error: Literal["raise", "skip"] = "raise"
    """What to do with a prompt that is too long: stop, or leave it out and count it."""
    reward_workers: int = Field(1, ge=1)
    """Worker processes that run the verifiers, per data-parallel rank."""
    reward_seconds: float = Field(5.0, gt=0)
    """Time limit of one verification; a slower one gets reward 0 and is counted."""
