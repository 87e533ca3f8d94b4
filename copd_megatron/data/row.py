"""What can be wrong with one row of a data set."""

from __future__ import annotations

from copd_megatron.errors import DataError


class BadRow(DataError):
    """A row that cannot be used; the source adds where it stands. `reason` is the kind of fault, for counting: `json`,
    `field`, `verifier`, `path`, `options`, `images` and `videos` (their number), `image` and `video` (their
    content)."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
