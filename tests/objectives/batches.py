"""Small batches of response tokens for the tests of the objectives, in float64 unless told otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from copd_megatron.policy.packed import Signals


@dataclass(frozen=True)
class Batch:
    """Arguments of `branch_loss`, and the logits [R, V] of the teacher that scored each row."""

    logits: torch.Tensor
    targets: torch.Tensor
    signals: Signals
    teacher_logits: torch.Tensor

    def rows(self, index: torch.Tensor) -> Batch:
        """The chosen rows of everything."""
        return Batch(
            self.logits.detach()[index].requires_grad_(),
            self.targets[index],
            rows_of(self.signals, index),
            self.teacher_logits[index],
        )

    def but(self, **changes: torch.Tensor | None) -> Batch:
        """The same batch with other signals."""
        return replace(self, signals=replace(self.signals, **changes))


def changed(signals: Signals, change: Callable[[torch.Tensor], torch.Tensor]) -> Signals:
    """The signals with every tensor changed; the teacher's logits are one of them, once they are asked for."""
    columns = {field.name: getattr(signals, field.name) for field in fields(signals)}
    found = {name: change(column) for name, column in columns.items() if isinstance(column, torch.Tensor)}
    if signals.teacher_logits is not None:
        found["teacher_logits"] = partial(_call, change, signals.teacher_logits)
    return replace(signals, **found)


def _call(change: Callable[[torch.Tensor], torch.Tensor], logits: Callable[[], torch.Tensor]) -> torch.Tensor:
    return change(logits())


def rows_of(signals: Signals, index: torch.Tensor) -> Signals:
    return changed(signals, lambda column: column[index])


def logprobs_of(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return torch.log_softmax(logits.detach().double() / temperature, -1).gather(-1, targets[:, None])[:, 0]


def build(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    source: torch.Tensor,
    k: int,
    temperature: float = 1.0,
) -> Batch:
    """A batch in which the engine agrees with the trainer and every teacher has scored its rows with top-k."""
    top_logprobs, top_ids = torch.log_softmax(teacher_logits.double() / temperature, -1).topk(k, dim=-1)
    native = source < 0
    signals = Signals(
        source=source,
        weight=torch.full(source.shape, 1 / max(1, len(source)), dtype=torch.float64),
        advantage=torch.where(native, torch.linspace(-1, 1, len(source), dtype=torch.float64), 0.0),
        engine_logprobs=logprobs_of(logits, targets, temperature),
        teacher_logprobs=logprobs_of(teacher_logits, targets, temperature).masked_fill(native, 0),
        teacher_top_ids=top_ids.masked_fill(native[:, None], 0),
        teacher_top_logprobs=top_logprobs.masked_fill(native[:, None], 0),
        teacher_logits=lambda: teacher_logits,
    )
    return Batch(logits.detach().clone().requires_grad_(), targets, signals, teacher_logits)


def random_batch(
    rows: int = 12, vocabulary: int = 11, k: int = 4, teachers: int = 2, seed: int = 0, temperature: float = 1.0
) -> Batch:
    """Rows of native tokens and of each teacher's in turn; teachers differ from the student."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 2
    teacher_logits = logits + torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    source = torch.arange(rows) % (teachers + 1) - 1
    return build(logits, teacher_logits, targets, source, k, temperature)


def sharp_batch(tail: float, teacher_tail: float = 0.01, vocabulary: int = 40, k: int = 4) -> Batch:
    """Float32 logits: the teacher's top-k hold all but about `tail` of the student's mass, all but `teacher_tail` of
    the teacher's. Half of the targets are among the rest."""
    batch = random_batch(vocabulary=vocabulary, k=k)
    best = torch.arange(vocabulary) < k
    sides = []
    for logits, rest in ((batch.logits.detach(), tail), (batch.teacher_logits, teacher_tail)):
        parts = logits.masked_fill(~best, -torch.inf), logits.masked_fill(best, -torch.inf)
        top, others = (torch.log_softmax(part / 2, -1) for part in parts)
        sides.append(torch.logaddexp(top + math.log1p(-rest), others + math.log(rest)).float().double())
    targets = torch.where(torch.arange(12) % 4 < 2, batch.targets % k, k + batch.targets % (vocabulary - k))
    return in_format(build(sides[0], sides[1], targets, batch.signals.source, k), torch.float32)


def in_format(batch: Batch, logits: torch.dtype) -> Batch:
    """Logits of both sides in the given format, everything else in float32."""
    signals = changed(batch.signals, lambda column: column.float() if column.is_floating_point() else column)
    teacher_logits = batch.teacher_logits.to(logits)
    return Batch(
        batch.logits.detach().to(logits).requires_grad_(),
        batch.targets,
        replace(signals, teacher_logits=lambda: teacher_logits),
        teacher_logits,
    )


def every_token_once(
    logits: torch.Tensor, teacher_logits: torch.Tensor, k: int, sampler: torch.Tensor | None = None
) -> tuple[torch.Tensor, Batch]:
    """One state whose response token takes each of the V values, weighted with its probability under `sampler` (or the
    student): the loss of this batch is the exact expectation over sampling. Returns the logits [V] to differentiate."""
    vocabulary = len(logits)
    state = logits.detach().clone().requires_grad_()
    source = torch.zeros(vocabulary, dtype=torch.int64)
    batch = build(
        logits.expand(vocabulary, -1), teacher_logits.expand(vocabulary, -1), torch.arange(vocabulary), source, k
    )
    probability = torch.softmax(logits.detach() if sampler is None else sampler, -1)
    batch = batch.but(weight=probability, engine_logprobs=probability.log())
    return state, replace(batch, logits=state.expand(vocabulary, -1))
