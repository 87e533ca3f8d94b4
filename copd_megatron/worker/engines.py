"""A branch and the engines that it uses: its own, which it gives weights to, and its peers', which it asks.

An embedded engine is part of the process and never lost. Servers can die; then the branch that they belong to hands
its weights over once more, which all ranks of its gang take part in, and whatever was asked is asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError, Interrupted
from copd_megatron.policy import layout
from copd_megatron.policy.trainer import Policy
from copd_megatron.rollout.engine import EngineLost, RolloutEngine
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.worker.actor import Actor
from copd_megatron.worker.probe import Probe
from copd_megatron.worker.snapshots import Snapshots
from copd_megatron.worker.spokesman import Spokesman
from copd_megatron.worker.window import Order

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_HAND_OVERS = 5
"""How often weights are handed over before the branch gives up on its engine."""


class EngineGone(CopdError):
    """An engine was lost and did not come back."""


class Engines:
    """Rank's view of the engines; `shared` says that peers ask the very engine that the branch samples from."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        actor: Actor | None,
        probe: Probe | None,
        spokesman: Spokesman | None,
        frozen: SGLangEngine | None,
        snapshots: Snapshots,
    ) -> None:
        self.shared = config.rollout.engine == "sglang"
        self._config = config
        self._policy = policy
        self._actor = actor
        self._probe = probe
        self._spokesman = spokesman
        self._frozen = frozen
        self._snapshots = snapshots
        self._frozen_version: int | None = None
        self._started = False

    def hand_over(self) -> None:
        """Give the policy's weights to the branch's engine. Raises EngineGone if it does not take them."""
        if not self.shared:
            self._give()
            return
        self._until_taken(self._give)
        self._started = True

    def freeze(self, version: int) -> None:
        """Give what was published as `version` to the servers that keep a phase's teachers, if there are any. Raises
        EngineGone if they do not take it."""
        if self.shared:
            self._frozen_version = version
            self._until_taken(self._give_frozen)

    def sleep(self) -> None:
        """The policy is going to train: where servers share its GPUs, they make room."""
        for engine in self._sleepers():
            engine.sleep()

    def wake(self) -> None:
        """The policy has trained, and is going to hand its weights over."""
        for engine in self._sleepers():
            engine.wake()

    def ask(self, work: Callable[[], Result], point: str | None, step: int) -> Result:
        """The result of `work`, which asks engines before update `step`.

        With `point` it asks peers' too: all branches end it together, so that none changes the weights that another
        still asks. Where an engine has lost its weights `work` is tried again when it has them back. Raises EngineGone
        if it does not get them, Interrupted if the run is to stop meanwhile, PeerLost if a peer is gone.
        """
        if not self.shared:
            return work()
        wait_seconds = self._config.teacher.wait_seconds
        window = self._spokesman.window(point, step, wait_seconds) if self._spokesman else None
        results: list[Result] = []
        order: Order = "try"
        while order != "leave":
            lost: set[str] = set()
            if order != "wait" and not results:
                try:
                    results.append(work())
                except EngineLost as error:
                    log.warning("%s", error)
                    lost.add(error.branch)
                    self._wait_for_base(error)
            reports = layout.gather_in_gang((lost, bool(results), self._hung()))
            everywhere = {name for names, _, _ in reports for name in names}
            done = all(ready for _, ready, _ in reports)
            self._report([hung for _, _, hung in reports])
            order, reason = layout.broadcast_in_gang(window.order(everywhere, done) if window else None)
            if order == "stop":
                raise EngineGone(reason) if reason else Interrupted(f"stopped before update {step}")
            if order == "renew":
                self.hand_over()
                self._until_taken(self._give_frozen)
            if order != "wait":
                for engine in self.asked():
                    engine.renew()
        return results[0]

    def counts(self) -> dict[str, int]:
        """What happened to engines since the last call, by the name of the metric."""
        counts: dict[str, int] = {}
        if self._actor is not None:
            for name, count in self._actor.engine.counts().items():
                counts[f"engine_{name}"] = count
            for teacher in self._actor.teachers.values():
                for name, count in teacher.engine.counts().items():
                    counts[f"teacher_{name}"] = counts.get(f"teacher_{name}", 0) + count
        if self._frozen is not None:
            for name, count in self._frozen.counts().items():
                counts[f"engine_{name}"] = counts.get(f"engine_{name}", 0) + count
        return counts

    def close(self) -> None:
        """End the connections."""
        if self._actor is not None:
            self._actor.engine.close()
        for engine in [*self.asked(), *([self._frozen] if self._frozen else [])]:
            engine.close()

    def asked(self) -> list[SGLangEngine]:
        """Servers that belong to others: teachers', peers' and the base's."""
        engines: list[RolloutEngine] = []
        if self._actor is not None:
            engines += [teacher.engine for teacher in self._actor.teachers.values()]
        if self._probe is not None:
            engines += [teacher.engine for teacher in self._probe.observed.values()]
            engines += [self._probe.base.engine] if self._probe.base is not None else []
        return [engine for engine in dict.fromkeys(engines) if isinstance(engine, SGLangEngine)]

    def _hung(self) -> set[str]:
        """Servers that this rank has found to hang."""
        engines: list[RolloutEngine | None] = [*self.asked(), self._frozen, self._actor.engine if self._actor else None]
        return {url for engine in engines if isinstance(engine, SGLangEngine) for url in engine.newly_hung()}

    def _report(self, hung: Iterable[set[str]]) -> None:
        """Tell the conductor, which starts the run's own servers again."""
        if self._spokesman is not None:
            for url in sorted(set().union(*hung)):
                self._spokesman.hung(url)

    def _until_taken(self, give: Callable[[], str | None]) -> None:
        """Hand weights over, again and again if need be; `give` tells why it has failed. Raises EngineGone."""
        for _ in range(_HAND_OVERS):
            # Every rank takes part in gathering the shards, and so has to know whether it is done again.
            reports = layout.gather_in_gang((give(), self._hung()))
            self._report([hung for _, hung in reports])
            reasons = [reason for reason, _ in reports if reason]
            if not reasons:
                return
            log.warning("the hand-over of weights is done again: %s", reasons[0])
        raise EngineGone(f"{_HAND_OVERS} hand-overs of weights have failed, at last: {reasons[0]}")

    def _give_frozen(self) -> str | None:
        """Why the servers that keep a phase's teacher do not have it, if there are any and they do not."""
        if self._frozen is None or self._frozen_version is None:
            return None
        try:
            if self._frozen.version < 0 or self._frozen.lost():
                self._frozen.wait(self._config.rollout.sglang.start_seconds)
            weights = self._snapshots.weights(self._frozen.name, self._frozen_version)
            self._frozen.update_weights(weights, self._frozen_version)
        except EngineLost as error:
            return str(error)
        return None

    def _give(self) -> str | None:
        """This rank's part of a hand-over; why it has failed, if it has."""
        weights = self._policy.named_weights()
        engine = self._actor.engine if self._actor is not None else None
        try:
            if engine is not None and not isinstance(engine, SGLangEngine):
                engine.update_weights(weights, self._policy.version)
            elif engine is not None and self._actor is not None and self._actor.sends:
                if not self._started or engine.lost():
                    engine.wait(self._config.rollout.sglang.start_seconds, every=not self._started)
                engine.update_weights(weights, self._policy.version)
            elif engine is not None:
                engine.follow(self._policy.version)
        except EngineLost as error:
            return str(error)
        finally:
            for _ in weights:  # every rank takes part to the end
                pass
        return None

    def _sleepers(self) -> Iterator[SGLangEngine]:
        actor = self._actor
        if actor is not None and actor.sends and self._config.rollout.sglang.sleep and self.shared:
            assert isinstance(actor.engine, SGLangEngine)
            yield actor.engine

    def _wait_for_base(self, lost: EngineLost) -> None:
        """The base's servers are nobody's to give weights to: they are there again, or they are not."""
        engine = self._probe.base.engine if self._probe is not None and self._probe.base is not None else None
        if engine is None or engine.name != lost.branch or not isinstance(engine, SGLangEngine):
            return
        try:
            engine.wait(self._config.rollout.sglang.start_seconds)
        except EngineLost as error:
            raise EngineGone(str(error)) from error
