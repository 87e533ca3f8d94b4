"""A branch: what one rank of its gang does when `train.py` says "sample", "grade", "update", "settle".

Three roles meet here. Every rank holds a shard of the policy. The first rank of each data-parallel replica has an
`Actor` (engine, prompts, teachers, verifiers). Rank 0 also has a `Spokesman` (peers, metrics).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from copd_megatron.config import RunConfig
from copd_megatron.errors import Interrupted
from copd_megatron.observe.timeline import Activity
from copd_megatron.policy import layout
from copd_megatron.policy.batching import NATIVE, Sample
from copd_megatron.policy.packed import MicroBatch
from copd_megatron.policy.resident import ResidentTeachers
from copd_megatron.policy.schedule import Loss, Measure, over_replicas
from copd_megatron.policy.trainer import Policy
from copd_megatron.rhythm import FixedRhythm, Step
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.rollout.types import Rollout
from copd_megatron.run_folder import RunFolder
from copd_megatron.steering.readings import Reading
from copd_megatron.steering.steered import SteeredRhythm
from copd_megatron.weights.hf import write_folder
from copd_megatron.worker.actor import Actor, Teacher
from copd_megatron.worker.checkpointer import Checkpointer
from copd_megatron.worker.engines import EngineGone, Engines
from copd_megatron.worker.probe import Findings, Probe
from copd_megatron.worker.resume import rank_state
from copd_megatron.worker.snapshots import Snapshots
from copd_megatron.worker.spokesman import Spokesman
from copd_megatron.worker.tally import Tally
from copd_megatron.worker.teacher_weights import TeacherWeights

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Branch:
    """One branch of a run, as seen by one rank of its gang."""

    def __init__(
        self,
        config: RunConfig,
        name: str,
        folder: RunFolder,
        policy: Policy,
        loss: Loss,
        drift: Measure,
        actor: Actor | None,
        probe: Probe | None,
        spokesman: Spokesman | None,
        checkpointer: Checkpointer,
        frozen: SGLangEngine | None,
        rhythm: FixedRhythm | SteeredRhythm,
        residents: ResidentTeachers | None,
    ) -> None:
        self.config = config
        self.rhythm = rhythm
        self.own = name
        self._lessons = config.lessons(name)
        self.teachers = list(self._lessons)
        self._folder = folder
        self._policy = policy
        self._loss = loss
        self._drift = drift
        self._actor = actor
        self._probe = probe
        self._spokesman = spokesman
        self._checkpointer = checkpointer
        self._snapshots = Snapshots(folder.snapshots)
        self._residents = residents
        self._resident = config.teacher.where == "resident" and bool(config.edges)
        self._step = Step(0, 0, "explore", 0, 1)
        self._teacher_version: int | None = None
        self._failures: Counter[str] = Counter()
        self._engines = Engines(config, policy, actor, probe, spokesman, frozen, self._snapshots)
        self._has_students = len(config.trained) > 1
        self._teacher_weights = TeacherWeights(
            name, self._snapshots, policy, spokesman is not None, published=self._has_students
        )
        self._streams: dict[str, Any] | None = None
        self._began = time.perf_counter()

    @property
    def version(self) -> int:
        """Updates this branch has made."""
        return self._policy.version

    # ------------------------------------------------------------------ one update, in the order of train.py

    def enter(self) -> None:
        """Before the first update: hand the weights to the engine and measure the starting point of a fresh run, or
        what a run that was cut short has not measured at the end of a phase."""
        self._remember_streams()
        self._hand_over()
        if self.version == 0 or (isinstance(self.rhythm, SteeredRhythm) and self.rhythm.overdue(self.version)):
            self._steer(self._measure(self._step.cycle))

    def begin(self, step: Step) -> None:
        """Announce an update. Raises Interrupted, with a checkpoint behind it, if the run is to stop before it."""
        self._step = step
        self._began = time.perf_counter()
        goes_on = self._from_rank_0(self._spokesman.begin(step) if self._spokesman else None)
        if not goes_on:
            self._save()
            self._checkpointer.wait()
            raise Interrupted(f"stopped before update {step.number}")

    def rollouts(self, capability: str, prompts: int) -> list[Rollout]:
        """G rollouts for each of `prompts` prompts (over all data-parallel ranks); empty where there is no actor."""
        with self._span("rollout"):
            if self._actor is None or not prompts:
                return self._ask(list)
            share = prompts // layout.data_parallel_size()
            return self._ask(self._actor.sampling_task(capability, share, self._step.number))

    def grade(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with their rewards."""
        if self._actor is None:
            return []
        with self._span("score"):
            graded, self._failures = self._actor.grade(rollouts)
            return graded

    def meet_teachers(self) -> None:
        """Bring every teacher to the version this step needs: the student's own, or the phase's first."""
        live = self.config.teacher.refresh == "step"
        wanted = self.version if live else self.version - self._step.index
        if live or self._teacher_version != wanted:  # or this process has not seen the phase's beginning
            self._teacher_version = wanted
            asked = self._engines.shared and live and not self._resident  # the engine itself, which has the weights
            if wanted == self.version and not asked:
                self._publish()
            if not live:
                with self._span("sync"):
                    self._engines.freeze(wanted)
            self._meet_peers(f"version/{wanted}", wanted)
        if self._actor is not None and not self._resident:  # resident teachers read what they need when they are asked
            self._load_teachers(self._actor.teachers, wanted)

    def lessons(self) -> dict[str, list[Rollout]]:
        """For every teacher, G rollouts for each prompt of its capability, with what its engine gives their tokens;
        empty lists where there is no actor."""
        # Other branches' engines are not asked where teachers are resident, so there is nothing to end together.
        point = None if self._resident else f"taught/{self._step.number}"
        with self._span("rollout" if self._resident else "score"):
            if self._actor is None:
                return self._ask(lambda: {teacher: [] for teacher in self.teachers}, point)
            assert self._teacher_version is not None
            replicas, step = layout.data_parallel_size(), self._step.number
            tasks = {
                name: self._actor.sampling_task(name, self._lessons[name] // replicas, step)
                if self._resident
                else self._actor.lesson_task(teacher, self._lessons[name] // replicas, step, self._teacher_version)
                for name, teacher in self._actor.teachers.items()
            }
            finished: dict[str, list[Rollout]] = {}

            def work() -> dict[str, list[Rollout]]:
                for name, task in tasks.items():
                    if name not in finished:
                        finished[name] = task()
                return finished

            return self._ask(work, point)

    def update(self, native: Sequence[Rollout], cross: Mapping[str, Sequence[Rollout]] | None = None) -> None:
        """One optimizer step from the branch's own graded rollouts and those that its teachers score or have scored."""
        group = self.config.rl.group
        prompts = self.config.rl.prompts if self._step.phase == "explore" else self.config.native_prompts
        counts = {NATIVE: prompts * group}
        counts |= {number: self._lessons[teacher] * group for number, teacher in enumerate(cross or {})}
        samples: list[Sample] | None = None
        tally = Tally()
        if self._actor is not None:
            self._check_versions([*native, *(rollout for scored in (cross or {}).values() for rollout in scored)])
            native_samples, flat = self._actor.native_samples(native)
            samples = native_samples + self._actor.cross_samples(cross or {})
            tally = Tally.of(
                native,
                cross or {},
                groups=len(native) // group,
                zero_variance=flat,
                refused=sum(stream.newly_refused() for stream in self._actor.streams.values()),
                **self._failures,
                **self._engines.counts(),
            )
        self._engines.sleep()
        with self._span("train"):
            teach = None if self._residents is None or cross is None else self._teach
            trained = self._policy.update(layout.broadcast_in_replica(samples), self._loss, counts, teach=teach)
        self._engines.wake()
        self._remember_streams()
        self._hand_over()
        self._write(trained, Tally.total(over_replicas(tally)))

    def settle(self) -> None:
        """After an update: measure drift and save, where that is due; see how far the last checkpoint is."""
        step = self._step
        over = step.closes_phase
        if over or self.version % self.config.log.probe_every == 0:
            readings = self._measure(step.cycle)
            over = self._steer(readings)
        if over or self.config.checkpoint.is_due(self.version):
            self._save(over)
        self._checkpointer.poll()

    def export(self) -> None:
        """Write the finished branch as a Hugging Face folder, after its last checkpoint."""
        self._checkpointer.wait()
        weights = self._policy.named_weights()
        if self._spokesman is not None:
            write_folder(self._folder.final(self.own), weights, like=self.config.base, overwrite=True)
        for _ in weights:  # every rank takes part to the end
            pass

    def close(self, ending: str) -> None:
        """Show how the branch has ended, close its files and let go of engines and reward workers."""
        if self._actor is not None:
            self._actor.rewards.close()
        self._engines.close()
        if self._spokesman is not None:
            self._spokesman.close(ending)

    # ------------------------------------------------------------------ weights

    def _hand_over(self) -> None:
        with self._span("sync"):
            self._engines.hand_over()

    def _ask(self, work: Callable[[], Result], point: str | None = None) -> Result:
        """The result of `work`, which asks engines (engines.py). Raises what `Engines.ask` does when an engine is lost
        for good or the run is to stop, with a checkpoint of the state before this step behind it."""
        try:
            return self._engines.ask(work, point, self._step.number)
        except (EngineGone, Interrupted):
            if self.version:
                self._save()
                self._checkpointer.wait()
            raise

    def _teach(self, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        assert self._residents is not None
        assert self._teacher_version is not None
        with self._span("score"):
            return self._residents.teach(batches, self._teacher_version)

    def _publish(self) -> None:
        with self._span("sync"):
            self._teacher_weights.publish()

    def _meet_peers(self, point: str, version: int) -> None:
        """Stand with all branches at `point`, where nobody reads other weights than those of `version` any more."""
        self._meet(point)
        self._teacher_weights.forget({version, *([] if self._teacher_version is None else [self._teacher_version])})

    def _load_teachers(self, teachers: Mapping[str, Teacher], version: int) -> None:
        with self._span("sync"):
            self._teacher_weights.load(teachers, version)

    def _check_versions(self, rollouts: Sequence[Rollout]) -> None:
        stale = {rollout.policy_version for rollout in rollouts} - {self.version}
        if stale:
            raise RuntimeError(f"rollouts of version {sorted(stale)} reached the update of version {self.version}")

    # ------------------------------------------------------------------ drift, checkpoints

    def _measure(self, cycle: int) -> dict[str, Reading]:
        """Write down how far the branch is from its peers; the readings of its edges, on rank 0."""
        if not self._engines.shared:  # else peers ask the engine itself
            self._publish()
        self._meet_peers(f"probe/{self.version}", self.version)
        actor, probe = self._actor, self._probe
        if probe is not None:
            self._load_teachers(probe.observed, self.version)

        def ask() -> tuple[dict[str, list[Sample]] | None, Findings]:
            return (None, Findings()) if actor is None or probe is None else probe.samples(actor, self.version)

        measured, found = self._ask(ask, f"probed/{self.version}")
        for name, samples in layout.broadcast_in_replica(measured).items():
            found.of_policy(name, self._policy.measure(samples, self._drift), len(samples))
        if self._spokesman is not None:
            self._spokesman.probed(self.version, cycle, found.numbers)
        return found.readings(self.own, self.teachers)

    def _steer(self, own: dict[str, Reading]) -> bool:
        """Let the rhythm take note of a probe; whether the phase ends with it. All branches switch together."""
        rhythm = self.rhythm
        if isinstance(rhythm, FixedRhythm):
            return self._step.closes_phase
        verdict = self._spokesman.agree(rhythm, self.version, own) if self._spokesman else None
        readings, reason = self._from_rank_0(verdict)
        switch = rhythm.heed(self.version, readings, reason)
        if switch is not None and self._spokesman is not None:
            self._spokesman.switched(switch)
        return switch is not None

    def _remember_streams(self) -> None:
        """Where the prompts stand between two updates: a checkpoint made in the middle of one goes back to there."""
        if self._actor is not None:
            self._streams = {name: stream.state_dict() for name, stream in self._actor.streams.items()}

    def _save(self, phase_is_over: bool = False) -> None:
        step = self._step
        done = self.version - (step.number - step.index)
        length = done if phase_is_over else step.length
        position = {"cycle": step.cycle, "phase": step.phase, "phase_step": done, "phase_steps": length}
        frozen = self._teacher_version if self.config.teacher.refresh == "phase" and 0 < done < length else None
        attached = {}
        if frozen is not None and step.phase == "exchange" and self._has_students:
            # Students go on learning from these weights, and no checkpoint need be of that version.
            file = self._snapshots.file(self.own, frozen)
            attached[file.name] = file
        state = rank_state(layout.data_parallel_rank(), self._streams) | {"teacher_version": self._teacher_version}
        if isinstance(self.rhythm, SteeredRhythm):
            state["rhythm"] = self.rhythm.state_dict()
        self._checkpointer.save({**position, "rhythm": self.config.rhythm.model_dump(mode="json")}, state, attached)

    # ------------------------------------------------------------------ numbers

    def _write(self, trained: dict[str, float], tally: Tally) -> None:
        if self._spokesman is not None:
            values = {self._named(key): value for key, value in trained.items()} | tally.metrics()
            values["count/skipped"] = int(values.pop("skipped"))
            self._spokesman.updated(self.version, self._step, values, time.perf_counter() - self._began)

    def _named(self, key: str) -> str:
        """`overlap/0` -> `overlap/image`: objectives number the teachers, people name them."""
        head, _, tail = key.rpartition("/")
        return f"{head}/{self.teachers[int(tail)]}" if tail.isdigit() else key

    def _span(self, activity: Activity) -> AbstractContextManager[None]:
        return self._spokesman.timeline.span(activity) if self._spokesman else nullcontext()

    def _meet(self, point: str) -> None:
        if self._spokesman is not None:
            self._spokesman.meet(point)
        self._from_rank_0(None)

    @staticmethod
    def _from_rank_0(value: Any) -> Any:
        return layout.broadcast_in_gang(value)
