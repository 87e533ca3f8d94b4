"""Verifiers in processes of their own, with a limit on time and memory: no response can stop or slow down a run.

A branch's responses are written by a model that is rewarded for what the verifiers accept, so some are hostile by
accident: `10**10**10`, formulas nested a thousand deep, text on which a regular expression never returns.
"""

from __future__ import annotations

import logging
import multiprocessing
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from copd_megatron.rewards import QUICK, known
from copd_megatron.rewards.judge import Item, judge, load, prepare
from copd_megatron.rewards.verdict import RewardError, Verdict

logger = logging.getLogger(__name__)

Outcome = list[Verdict] | Literal["timeout", "crashed", "lost"]
"""A batch's verdicts; or it took too long, its process died, or the pool broke, which says nothing about the batch."""

_START_SECONDS = 120.0  # imports from a cluster's shared file system can be this slow
_LARGEST_BATCH = 64
_ATTEMPTS = 3


class RewardPool:
    """Worker processes that judge responses; started at the first `score`, and again when one dies.

    `time_limit` is in seconds per response (loading a verifier does not count), `memory` in bytes per process beyond
    what its imports take. Responses longer than `max_characters` are unparsable without being read. Use it from one
    thread, and close it, or use it as a context manager. Workers import the main module again under another name, so a
    program that uses a pool imports torch inside its functions.
    """

    def __init__(
        self, workers: int = 1, time_limit: float = 5.0, memory: int = 2 * 2**30, max_characters: int = 1_000_000
    ) -> None:
        if workers < 1 or time_limit <= 0 or memory < 1:
            raise ValueError(f"workers {workers}, time_limit {time_limit} and memory {memory} must all be above 0")
        self._workers = workers
        self._time_limit = time_limit
        self._memory = memory
        self._max_characters = max_characters
        self._names: set[str] = set()
        self._pool: ProcessPool | None = None
        self._stop: weakref.finalize[..., RewardPool] | None = None

    def score(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict per (verifier, response, answer), in order. Equal items are judged once.

        An item whose process dies is tried a second time before it counts as "error". Raises ConfigError for an
        unknown verifier, RewardError if a verifier cannot be loaded or the processes cannot be kept alive.
        """
        too_long = Verdict(0.0, "unparsable", f"the response is longer than {self._max_characters} characters")
        verdicts = {item: too_long for item in items if len(item[1]) > self._max_characters}
        batches = self._split([item for item in dict.fromkeys(items) if item not in verdicts])
        crashes: Counter[Item] = Counter()
        losses = 0
        while batches:
            outcomes = self._run(batches)
            losses = losses + 1 if any(outcome == "lost" for _, outcome in outcomes) else 0
            if losses == _ATTEMPTS:
                raise RewardError(
                    f"the reward workers broke down {losses} times in a row; is this machine out of memory?"
                )
            batches = []
            for batch, outcome in outcomes:
                first = batch[0]
                if isinstance(outcome, list):
                    verdicts.update(zip(batch, outcome, strict=True))
                elif outcome == "lost":
                    batches.append(batch)
                elif len(batch) > 1:  # one of them is to blame: find out which
                    batches += [[item] for item in batch]
                elif outcome == "timeout":
                    verdicts[first] = Verdict(0.0, "timeout", f"took longer than {self._time_limit:g} s")
                elif crashes[first]:
                    verdicts[first] = Verdict(0.0, "error", "the verifier's process died twice")
                else:
                    crashes[first] += 1
                    batches.append(batch)
        return [verdicts[item] for item in items]

    def close(self) -> None:
        """Stop the workers at once. The next `score` starts new ones."""
        self._pool = None
        if self._stop is not None:
            self._stop()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _split(self, items: Sequence[Item]) -> list[list[Item]]:
        """Quick verifiers' items in batches, because a message costs more than they do; others' one by one, so that
        the time limit is theirs alone."""
        quick = [item for item in items if item[0] in QUICK]
        size = min(_LARGEST_BATCH, -(-len(quick) // self._workers) or 1)
        batches = [quick[start : start + size] for start in range(0, len(quick), size)]
        return [[item] for item in items if item[0] not in QUICK] + batches

    def _run(self, batches: Sequence[list[Item]]) -> list[tuple[list[Item], Outcome]]:
        """Judge all batches and wait for every outcome."""
        pool = self._started({item[0] for batch in batches for item in batch})
        orphaned = 2 * self._time_limit + 2
        futures: list[ProcessFuture[Any] | None] = []
        for batch in batches:
            try:
                futures.append(pool.schedule(judge, args=(batch, orphaned), timeout=self._time_limit))
            except RuntimeError:  # the pool broke meanwhile, for instance because an idle worker was killed
                futures.append(None)
        outcomes = [self._outcome(future) for future in futures]
        if "lost" in outcomes:
            logger.warning("the reward workers broke down; starting new ones")
            self.close()
        return list(zip(batches, outcomes, strict=True))

    def _outcome(self, future: ProcessFuture[Any] | None) -> Outcome:
        """What became of a batch. The earlier ones have finished, so it is running or about to."""
        if future is None:
            return "lost"
        patience = _START_SECONDS + 2 * self._time_limit if self._pool is not None else 0
        try:
            verdicts: list[Verdict] = future.result(timeout=patience)
            return verdicts
        except TimeoutError:
            if future.done():
                return "timeout"
            self.close()
            return "lost"
        except ProcessExpired:
            return "crashed"
        except Exception as error:
            logger.warning("reward workers: %s: %s", type(error).__name__, error)
            return "lost"

    def _started(self, names: set[str]) -> ProcessPool:
        """The running pool, with `names` loaded."""
        if self._pool is not None and names <= self._names:
            return self._pool
        for name in names:
            known(name)
        self.close()
        wanted = sorted(self._names | names)
        pool = ProcessPool(
            max_workers=self._workers,
            initializer=prepare,
            initargs=(wanted, self._memory),
            context=multiprocessing.get_context("spawn"),
        )
        self._stop = weakref.finalize(self, _stop, pool)
        try:
            pool.schedule(load, args=(wanted,)).result(timeout=_START_SECONDS)
        except (TimeoutError, RuntimeError, ProcessExpired) as error:
            self.close()
            raise RewardError(f"the reward workers do not start: {type(error).__name__}: {error}") from error
        except Exception as error:
            self.close()
            named = ", ".join(sorted(names))
            raise RewardError(f"one of {named} cannot be loaded: {type(error).__name__}: {error}") from error
        self._pool, self._names = pool, set(wanted)
        return pool


def _stop(pool: ProcessPool) -> None:
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()
