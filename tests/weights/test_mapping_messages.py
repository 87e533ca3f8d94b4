"""Messages of the weight mapping stay short for models of hundreds of experts."""

from __future__ import annotations

import torch

from copd_megatron.weights import mapping
from copd_megatron.weights.collect import Entry
from copd_megatron.weights.families.row import EachExpert, Row


def test_misfit_of_many_experts_names_a_few_and_their_number() -> None:
    names = tuple(f"experts.{number}.down_proj" for number in range(128))
    entry = Entry.of(Row("experts.#.fc2.weight", names, EachExpert(1), shard=1, experts=128), 0)
    message = str(mapping._misfit(entry, [torch.empty(4, 2)] * 128, (4, 3), 2))
    assert message.startswith("128 tensors: experts.0.down_proj [4, 2], experts.1.down_proj [4, 2], ")
    assert message.count("down_proj") == mapping.LISTED
    assert "each of 128 experts' experts.#.fc2.weight is [4, 3] on each of 2 tensor parallel ranks" in message
