"""When a branch's part of a checkpoint is written, and when the whole run's counts.

A step boundary at which something is due costs training a copy to host memory. Later boundaries ask, without waiting,
whether every rank has written its part, then whether every branch has; the first branch to see that writes the run's
manifest. There is one checkpoint under way at a time: the next one waits until it counts. All branches save at the
same steps and meet at the same points in between, so none waits for one that waits for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from copd_megatron.config import RunConfig
from copd_megatron.errors import CopdError
from copd_megatron.fingerprint import fingerprint
from copd_megatron.policy import layout
from copd_megatron.policy.checkpoint import Saving
from copd_megatron.policy.trainer import Policy
from copd_megatron.run_checkpoints import RunCheckpoints, description
from copd_megatron.run_folder import RunFolder
from copd_megatron.worker.spokesman import Spokesman

log = logging.getLogger(__name__)


class Checkpointer:
    """One rank's share in the checkpoints of a branch. All methods are collective over the gang."""

    def __init__(
        self,
        config: RunConfig,
        branch: str,
        folder: RunFolder,
        policy: Policy,
        spokesman: Spokesman | None,
        resumed: int,
    ) -> None:
        """`resumed` is the step that the run goes on from, whose checkpoint counts already; 0 for the base."""
        self._config = config
        self._settings = config.checkpoint
        self._branch = branch
        self._policy = policy
        self._spokesman = spokesman
        self._checkpoints = RunCheckpoints(folder, [other.name for other in config.trained])
        self._description = description(config, fingerprint(config.base)) if spokesman is not None else {}
        self._begun = resumed
        self._saving: Saving | None = None
        self._awaited: int | None = None
        self._position: Mapping[str, Any] = {}

    def save(self, position: Mapping[str, Any], state: dict[str, Any], attached: Mapping[str, Path]) -> None:
        """Begin the checkpoint of the policy's present version, unless it has been begun.

        `position` says for the run's manifest where in the algorithm that is; `state` is this rank's, and `attached`
        are rank 0's files, as in `checkpoint.Saving`. Raises CopdError, on every rank, if this checkpoint or the one
        before cannot be written, PeerLost if a branch is gone that the one before waits for.
        """
        step = self._policy.version
        if step == self._begun:
            return
        self.wait()
        began = time.perf_counter()
        if self._spokesman is not None:
            self._spokesman.say(state="checkpoint")
            self._spokesman.sync()
        background = self._settings.asynchronous
        self._saving = Saving(
            self._policy, self._checkpoints.part(self._branch, step), state, background=background, attached=attached
        )
        self._begun = self._awaited = step
        self._position = dict(position)
        log.info("checkpoint of step %d: training waited %.3f s", step, time.perf_counter() - began)
        if not background:
            self._finish_part()
            self._commit(wait=False)

    def poll(self) -> None:
        """At a step boundary: take the checkpoint under way further, as far as that goes without waiting."""
        if self._saving is not None and self._saving.done_everywhere():
            self._finish_part()
        if self._saving is None and self._awaited is not None:
            self._commit(wait=False)

    def wait(self) -> None:
        """Return when the checkpoint under way counts."""
        if self._saving is not None:
            self._finish_part()
        if self._awaited is not None:
            self._commit(wait=True)

    def _finish_part(self) -> None:
        saving, self._saving = self._saving, None
        assert saving is not None
        assert self._awaited is not None
        try:
            saving.finish()
        except CopdError:
            self._awaited = None
            raise
        if self._spokesman is not None:
            self._spokesman.saved(self._awaited, self._checkpoints.entry(self._branch, self._awaited))

    def _commit(self, wait: bool) -> None:
        outcome: tuple[bool, CopdError | None] | None = None
        if self._spokesman is not None:
            try:
                outcome = self._commit_on_first_rank(self._spokesman, wait), None
            except CopdError as error:  # as it is: after the loss of a peer the run goes on, after others it does not
                outcome = False, error
            except OSError as error:
                outcome = False, CopdError(str(error))
        counts, failure = layout.broadcast_in_gang(outcome)
        if failure is not None:
            raise failure
        if counts:
            self._awaited = None

    def _commit_on_first_rank(self, spokesman: Spokesman, wait: bool) -> bool:
        step = self._awaited
        assert step is not None

        def write(parts: dict[str, Any]) -> None:
            try:
                self._checkpoints.commit(step, {**self._position, **self._description}, parts)
            except OSError as error:
                raise CopdError(
                    f"the checkpoint of step {step} could not be completed ({error}); older ones are untouched. Make "
                    "room or choose another run_dir, and start again"
                ) from error
            self._checkpoints.prune(self._settings.keep, self._settings.keeps)

        counts = spokesman.commit(step, write, wait)
        if counts:
            self._checkpoints.clear(self._branch, before=step)
            spokesman.say(event=f"checkpoint at step {step}")
        return counts
