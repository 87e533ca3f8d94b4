"""The engines that a branch's configuration asks for: its own, its peers', and those that keep older weights."""

from __future__ import annotations

from copd_megatron.config import RunConfig
from copd_megatron.config.engines import BASE, SGLangConfig, frozen_group
from copd_megatron.rollout.embedded import EmbeddedEngine
from copd_megatron.rollout.engine import RolloutEngine
from copd_megatron.rollout.sglang.broadcast import Broadcast
from copd_megatron.rollout.sglang.client import Limits
from copd_megatron.rollout.sglang.endpoints import read_endpoints
from copd_megatron.rollout.sglang.engine import SGLangEngine
from copd_megatron.rollout.sglang.files import Files
from copd_megatron.rollout.sglang.shared_memory import SharedMemory
from copd_megatron.rollout.sglang.transport import Transport
from copd_megatron.run_folder import RunFolder


class OpenEngines:
    """Opens engines for branch `own`; servers of the same Slurm job reach its rank 0 at `host`."""

    def __init__(self, config: RunConfig, folder: RunFolder, own: str, host: str) -> None:
        self._config = config
        self._folder = folder
        self._own = own
        self._host = host
        self._shared = config.rollout.engine == "sglang"
        self._endpoints = read_endpoints(folder.endpoints) if self._shared else {}

    def of(self, owner: str) -> RolloutEngine:
        """The engine of a branch, of a finished expert or of the base; experts and base have their weights, as
        version 0."""
        if self._shared:
            return self._servers(owner, owner)
        finished = {BASE: self._config.base, **self._config.frozen}
        model = finished.get(owner, self._config.base)
        return EmbeddedEngine(owner, model, load_weights=owner in finished, max_rows=self._config.rollout.max_rows)

    def as_teacher(self, peer: str, observed: RolloutEngine) -> RolloutEngine:
        """The engine that teaches what `peer` knows: `observed`, its own, unless servers keep what it knew."""
        return self._servers(frozen_group(peer), peer) if frozen_group(peer) in self._endpoints else observed

    def frozen(self) -> SGLangEngine | None:
        """The servers that keep for a phase what this branch knew at its beginning; None if none do."""
        group = frozen_group(self._own)
        return self._servers(group, self._own) if group in self._endpoints else None

    def _servers(self, group: str, owner: str) -> SGLangEngine:
        settings = self._config.rollout.sglang
        engine = SGLangEngine(
            owner,
            self._config.base,
            self._endpoints[group],
            self._transport(settings, group) if owner == self._own else None,
            Limits(settings.in_flight, settings.request_seconds, settings.hang_seconds),
            settings.attempts,
        )
        if owner == BASE:
            engine.follow(0)
        return engine

    def _transport(self, settings: SGLangConfig, group: str) -> Transport:
        size = settings.bucket_mib << 20
        if settings.transport == "files":
            return Files(size, self._folder.branches.resolve() / group / "handover")
        if settings.transport == "broadcast":
            # On one machine that is the loopback, which servers of somebody else could not reach.
            own = self._host if self._config.cluster.launcher == "slurm" else settings.host
            return Broadcast(size, settings.address or own)
        return SharedMemory(size)
