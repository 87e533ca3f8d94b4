"""Operations on digits, the right rule and the wrong one, and which question belongs to which split."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from copd_megatron.data.mini.task import Modality, Operation, Split
from copd_megatron.randomness import seed_for

PARTITION: dict[Split, int] = {"cold_start": 30, "train": 50, "validation": 10, "test": 10}
"""Percent of all questions (operation and digits) that each split gets."""

_SPLITS = tuple(PARTITION)
_BOUNDS = tuple(accumulate(PARTITION.values()))


@dataclass(frozen=True)
class Question:
    """An operation and the digits it is about."""

    operation: Operation
    digits: tuple[int, ...]

    def written(self, modality: Modality) -> str:
        """The text part: with the digits if there is neither a picture nor a video to read them from."""
        return f"{self.operation} {_join(self.digits)}=" if modality == "text" else f"{self.operation}="

    def solve(self, ordinary: bool = True) -> int | tuple[int, ...]:
        """A number, or for `srt` and `rev` a sequence of digits, by the rule that `Quality` calls right or by the
        other one."""
        digits = self.digits
        match self.operation:
            case "sum":
                return sum(digits if ordinary else digits[:-1])
            case "dif":
                return max(digits) - min(digits) if ordinary else abs(digits[0] - digits[-1])
            case "max":
                return max(digits) if ordinary else min(digits)
            case "srt":
                return tuple(sorted(digits, reverse=not ordinary))
            case "chg":
                return sum(abs(a - b) for a, b in pairwise(digits if ordinary else (digits[0], digits[-1])))
            case "rev":
                return digits[::-1] if ordinary else digits

    def respond(self, solution: int | tuple[int, ...]) -> str:
        """The response that reads the digits and gives `solution`: `3852>18`, `3852>2358`."""
        return f"{_join(self.digits)}>{solution if isinstance(solution, int) else _join(solution)}"


def gold_answer(solution: int | tuple[int, ...]) -> str:
    """How a solution is handed to the verifier: `18` for a number, `2 3 5 8` for a sequence (rewards/digits.py)."""
    return str(solution) if isinstance(solution, int) else " ".join(map(str, solution))


def split_of(question: Question) -> Split:
    """The split a question belongs to, in every modality and for every seed.

    It depends on the question alone: a model trained with one seed has never seen the test questions of another, and
    a test question in a picture was not a training question in text.
    """
    percentile = seed_for(0, "mini question", question.operation, *question.digits) % 100
    return _SPLITS[bisect_right(_BOUNDS, percentile)]


def _join(digits: Sequence[int]) -> str:
    return "".join(map(str, digits))
