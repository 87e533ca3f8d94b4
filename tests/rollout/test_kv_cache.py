from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from copd_megatron.rollout.kv_cache import RoomyLayer


def states(rows: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 2, length, 4, generator=torch.Generator().manual_seed(seed))


def test_roomy_layer_holds_what_the_copying_layer_holds() -> None:
    roomy, copying = RoomyLayer(), DynamicLayer()
    rows = 3
    for seed in range(120):
        length = 7 if seed in (0, 40) else 1
        keys, values = states(rows, length, seed), states(rows, length, 1000 + seed)
        for ours, theirs in zip(roomy.update(keys, values), copying.update(keys, values), strict=True):
            assert torch.equal(ours, theirs)
        if seed == 20:
            roomy.batch_repeat_interleave(2)
            copying.batch_repeat_interleave(2)
            rows = 6
        if seed == 60:
            kept = torch.tensor([5, 0, 0])
            roomy.batch_select_indices(kept)
            copying.batch_select_indices(kept)
            rows = 3
        assert roomy.get_seq_length() == copying.get_seq_length()


def test_appending_a_token_does_not_move_the_ones_before_it() -> None:
    layer = RoomyLayer()
    layer.update(states(2, 5, 0), states(2, 5, 1))
    layer.update(states(2, 1, 2), states(2, 1, 3))
    before = layer.keys.data_ptr(), layer.values.data_ptr()
    layer.update(states(2, 1, 4), states(2, 1, 5))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == before


def test_the_prompt_of_one_group_is_not_written_to_by_another() -> None:
    prompt = states(1, 3, 0)
    layer = RoomyLayer()
    layer.update(prompt, prompt.clone())
    layer.batch_repeat_interleave(2)
    layer.update(states(2, 1, 1), states(2, 1, 2))
    assert torch.equal(layer.keys[0, :, :3], layer.keys[1, :, :3])
    assert not torch.equal(layer.keys[0, :, 3], layer.keys[1, :, 3])
