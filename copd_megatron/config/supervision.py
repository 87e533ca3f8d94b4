"""Configuration of what the conductor does when something it watches fails."""

from __future__ import annotations

from pydantic import Field

from copd_megatron.config.section import Section


class SupervisionConfig(Section):
    """When a branch counts as failed, and how often all branches go back to their last checkpoint because of it."""

    max_restarts: int = Field(3, ge=0)
    """How often that happens without a newer checkpoint in between; then the run stops with the reason."""
    heartbeat_seconds: float = Field(60.0, ge=10.0)
    """Longest silence of a process. A dead one shows at once; one that was stopped, or whose node is gone or cut off,
    after this time. A network that is down for a shorter time does no harm."""
    stall_seconds: float = Field(1800.0, ge=10.0)
    """Longest time in which a branch may do one thing (load, sample, train, save) without coming to its end. Above the
    longest of them."""
