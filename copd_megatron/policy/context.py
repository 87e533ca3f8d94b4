"""Context parallelism: which of a micro-batch's tokens each rank computes.

Rank r of c takes tokens r, r + c, r + 2c, … of the packed order. A late token attends to more than an early one; in
stripes every rank gets of each sequence as many late tokens as early ones, whatever the lengths. Keys and values are
gathered; everything else stays on its rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from copd_megatron.policy.packed import MicroBatch, Segments, Signals


@dataclass(frozen=True)
class Stripe:
    """Every `count`-th token of a packed sequence, from token `rank` on."""

    rank: int = 0
    count: int = 1

    def holds(self, index: Tensor) -> Tensor:
        """Which of the tokens `index` are in the stripe, bool of the same shape."""
        return index % self.count == self.rank

    def place(self, index: Tensor) -> Tensor:
        """Where in the stripe the tokens `index` are, for tokens that are in it."""
        return index // self.count


WHOLE = Stripe()
"""Every token."""


def share(batch: MicroBatch, stripe: Stripe, multiple: int = 1) -> MicroBatch:
    """The part of `batch` whose tokens are in `stripe`: so many on every rank, and a multiple of `multiple`.

    Tokens are added where the division does not come out even: as one more response, which nothing is predicted from.
    `segments` stay those of the whole batch, all images stay, and of the response tokens those that are predicted from
    a token of the stripe are left.
    """
    batch = _padded(batch, -batch.segments.tokens % (stripe.count * multiple))
    if stripe.count == 1:
        return batch
    mine = stripe.holds(batch.logit_index)
    rows = mine.nonzero()[:, 0]
    own = replace(
        batch,
        token_ids=batch.token_ids[stripe.rank :: stripe.count],
        position_ids=batch.position_ids[:, stripe.rank :: stripe.count],
        logit_index=stripe.place(batch.logit_index[rows]),
        targets=batch.targets[rows],
        sequence=batch.sequence[rows],
        signals=_rows(batch.signals, rows),
        stripe=stripe,
        response_rows=rows,
    )
    if batch.visual_index is None:
        return own
    patches = stripe.holds(batch.visual_index).nonzero()[:, 0]
    return replace(own, visual_index=stripe.place(batch.visual_index[patches]), visual_rows=patches)


def _padded(batch: MicroBatch, missing: int) -> MicroBatch:
    if not missing:
        return batch
    segments: Segments = replace(
        batch.segments,
        response_lengths=torch.cat([batch.segments.response_lengths, torch.tensor([missing])]),
        prompt_of=torch.cat([batch.segments.prompt_of, torch.tensor([0])]),
    )
    return replace(
        batch,
        token_ids=torch.cat([batch.token_ids, batch.token_ids.new_zeros(missing)]),
        position_ids=torch.cat([batch.position_ids, batch.position_ids.new_zeros(3, missing)], dim=1),
        segments=segments,
    )


def _rows(signals: Signals, rows: Tensor) -> Signals:
    values = {field.name: getattr(signals, field.name) for field in fields(signals)}
    return replace(signals, **{name: value[rows] for name, value in values.items() if value is not None})
