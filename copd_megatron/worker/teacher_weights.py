"""Weights on their way from a branch to those it teaches, and from its teachers to it, by way of snapshots.

Servers need this only where they keep a phase's teachers: else peers ask the very engine that the branch samples from.
Finished experts, whose engines have been opened with their weights, do not need it, nor a branch that has no peers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from copd_megatron.policy.trainer import Policy
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.worker.actor import Teacher
from copd_megatron.worker.snapshots import Snapshots


class TeacherWeights:
    """One rank's share in that: `speaks` is true on the rank that writes the branch's files, `published` if anybody
    needs them."""

    def __init__(self, own: str, snapshots: Snapshots, policy: Policy, speaks: bool, published: bool) -> None:
        self._own = own
        self._snapshots = snapshots
        self._policy = policy
        self._speaks = speaks
        self._needed = published
        self._published: int | None = None

    def publish(self) -> None:
        """Let peers have the policy's present weights, unless they do. Collective over the gang."""
        if not self._needed or self._published == self._policy.version:
            return
        weights = self._policy.named_weights()
        if self._speaks:
            self._snapshots.publish(self._own, self._policy.version, weights)
        for _ in weights:  # every rank takes part to the end
            pass
        self._published = self._policy.version

    def forget(self, keep: Collection[int]) -> None:
        """Delete all of the branch's snapshots but those of the versions `keep`: nobody reads older ones any more."""
        if self._speaks:
            self._snapshots.forget(self._own, keep)

    def load(self, teachers: Mapping[str, Teacher], version: int) -> None:
        """Give the peers' engines the weights that the peers have published as `version`, or expect those there."""
        for name, teacher in teachers.items():
            if teacher.frozen:
                continue
            if isinstance(teacher.engine, SGLangEngine):
                teacher.engine.follow(version)
            elif teacher.engine.version != version:
                teacher.engine.update_weights(self._snapshots.weights(name, version), version)
