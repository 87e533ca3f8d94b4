"""What runs inside a reward worker process: limits, loading verifiers, judging a batch of responses."""

from __future__ import annotations

import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from copd_megatron.rewards import verifier
from copd_megatron.rewards.verdict import Unparsable, Verdict

Item = tuple[str, str, str]
"""Name of the verifier, response, gold answer."""


def prepare(names: Sequence[str], memory: int) -> None:
    """Make a fresh process ready: verifiers loaded, at most `memory` bytes more than that takes, no core dumps."""
    # The default action ends the process even inside a long C call, where Python's handlers would wait for their turn.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    with suppress(Exception):  # a verifier that cannot be loaded is `load`'s to report: it can reach the caller
        load(names)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def load(names: Sequence[str]) -> None:
    """Import the verifiers. Raises what the imports raise."""
    for name in names:
        verifier(name)


def judge(items: Sequence[Item], seconds: float) -> list[Verdict]:
    """One verdict per item. The process ends itself after `seconds`, should its parent have died unseen."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return [_judge(*item) for item in items]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _judge(name: str, response: str, answer: str) -> Verdict:
    try:
        reward = float(verifier(name)(response, answer))
    except Unparsable as error:
        return Verdict(0.0, "unparsable", str(error))
    except BaseException as error:  # SystemExit too: it would be raised again in the caller's process
        return Verdict(0.0, "error", f"{type(error).__name__}: {error}"[:300])
    if not 0.0 <= reward <= 1.0:
        return Verdict(0.0, "error", f"verifier {name!r} gave {reward}, expected a reward from 0 to 1")
    return Verdict(reward, "ok")
