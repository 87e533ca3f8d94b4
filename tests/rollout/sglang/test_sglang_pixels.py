from __future__ import annotations

import json

import pytest
import torch

from copd_megatron.rollout.sglang import pixels

WEIGHTS = "run/text/3"
GRID = torch.tensor([[1, 2, 4], [1, 4, 2]])


def patches(levels: int, width: int = 96) -> torch.Tensor:
    """Patches [16, width] whose values are `levels` different ones in each colour."""
    random = torch.Generator().manual_seed(levels)
    table = torch.randn(3, levels, generator=random)
    codes = torch.randint(levels, (16, 3, width // 3), generator=random)
    return torch.stack([table[colour][codes[:, colour]] for colour in range(3)], dim=1).reshape(16, width)


def encoded(sent: torch.Tensor) -> str:
    return pixels.encode(pixels.Patches(sent, GRID, ((2, 3), (6, 7)), WEIGHTS))


@pytest.mark.parametrize("levels", [1, 7, 253])
def test_pictures_travel_as_bytes_and_arrive_bit_for_bit(levels: int) -> None:
    sent = patches(levels)
    if levels > 2:
        sent[2, 4], sent[3, 5], sent[4, 6] = 0.0, -0.0, float("nan")
    text = encoded(sent)
    assert "codes" in json.loads(text.removeprefix(pixels.SCHEME))
    arrived = pixels.decode(text)
    assert torch.equal(arrived.pixel_values.view(torch.int32), sent.view(torch.int32))
    assert torch.equal(arrived.grid_thw, GRID)
    assert arrived.offsets == ((2, 3), (6, 7))
    assert (arrived.weights, arrived.seconds, arrived.positions) == (WEIGHTS, (), None)
    assert len(text) < sent.nbytes / 2 + 8000


@pytest.mark.parametrize(
    "sent",
    [
        torch.randn(16, 96),
        torch.arange(16 * 32, dtype=torch.float32).reshape(16, 32),
    ],
    ids=["more values than a byte has", "not three colours"],
)
def test_anything_else_travels_as_it_is(sent: torch.Tensor) -> None:
    arrived = pixels.decode(encoded(sent))
    assert torch.equal(arrived.pixel_values.view(torch.int32), sent.view(torch.int32))


def test_how_long_frames_last_and_positions_come_along() -> None:
    positions = torch.arange(60).reshape(3, 20)
    video = pixels.Patches(patches(7), GRID, ((2, 3), (6, 7)), WEIGHTS, seconds=(0.5, 1 / 3), positions=positions)
    arrived = pixels.decode(pixels.encode(video))
    assert (arrived.offsets, arrived.seconds) == (video.offsets, video.seconds)
    assert arrived.positions is not None
    assert torch.equal(arrived.positions, positions)


def test_damage_is_refused_with_its_reason() -> None:
    text = encoded(patches(7))
    item = json.loads(text.removeprefix(pixels.SCHEME))
    for key, value, reason in [
        ("codes", item["codes"][:-8], "damaged"),
        ("codes", "$$$$", "damaged"),
        ("table", item["table"][:-8], "damaged"),
        ("grid_thw", [[1, 2, 4]], "16 patches"),
        ("grid_thw", "here", "damaged"),
        ("offsets", [[2, 3]], "2 images or frames at 1 places"),
        ("shape", [15, 96], "damaged"),
        ("positions", "AAAA", "damaged"),
        ("seconds", [1.0], "2 images or frames at 2 places"),
    ]:
        with pytest.raises(ValueError, match=reason):
            pixels.decode(pixels.SCHEME + json.dumps({**item, key: value}))
    with pytest.raises(ValueError, match="damaged"):
        pixels.decode(text[: len(text) // 2])


def test_an_image_is_another_to_other_weights_in_another_shape_and_at_another_pace() -> None:
    image, other = patches(7), patches(8)
    facts = [
        (seen, grid, seconds, weights)
        for seen in (image, other)
        for grid in (GRID[:1], GRID[1:])
        for seconds in ((), (0.5,), (1.0,))
        for weights in ("run/text/3", "run/text/4")
    ]
    assert len({pixels.identity(*each) for each in facts}) == len(facts) == 24
    assert pixels.identity(image.clone(), GRID, (), WEIGHTS) == pixels.identity(image, GRID.clone(), (), WEIGHTS)
