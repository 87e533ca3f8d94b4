"""An endless, seeded, resumable stream of prompts of one capability for one data-parallel rank."""

from __future__ import annotations

from collections import Counter
from typing import Any

from copd_megatron.data.capability import Capability
from copd_megatron.data.prompts import PromptBuilder
from copd_megatron.data.sampler import Sampler
from copd_megatron.errors import DataError
from copd_megatron.rollout.types import Prompt


class PromptStream:
    """Draws examples in the sampler's order and builds prompts of them.

    With `skip` a prompt that cannot be built (too long, an image that does not decode) is counted in `refused` and the
    next example takes its place; otherwise DataError is raised.
    """

    def __init__(self, capability: Capability, builder: PromptBuilder, sampler: Sampler, skip: bool) -> None:
        self._capability = capability
        self._builder = builder
        self._sampler = sampler
        self._skip = skip
        self.refused: Counter[str] = Counter()
        self._told = 0

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        prompts: list[Prompt] = []
        attempts = 0
        while len(prompts) < count:
            examples = [self._capability.train[index] for index in self._sampler.draw(count - len(prompts))]
            built, refused = self._builder.build_many(examples, self._capability.name)
            if refused and not self._skip:
                uid, reason = refused[0]
                raise DataError(f"{uid}: {reason} (data.on_error=skip leaves such prompts out)")
            self.refused.update(reason.split(":")[0] for _, reason in refused)
            prompts += built
            attempts += len(examples)
            if attempts > 10 * count + len(self._capability.train):
                raise DataError(f"{self._capability.name}: no usable prompt in a whole epoch: {dict(self.refused)}")
        return prompts

    def newly_refused(self) -> int:
        """Prompts refused since the last call."""
        told, self._told = self._told, self.refused.total()
        return self._told - told

    def state_dict(self) -> dict[str, Any]:
        """Position in the data and what was refused so far."""
        return {"sampler": self._sampler.state_dict(), "refused": dict(self.refused)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved position."""
        self._sampler.load_state_dict(state["sampler"])
        self.refused = Counter(state["refused"])
        self._told = self.refused.total()
