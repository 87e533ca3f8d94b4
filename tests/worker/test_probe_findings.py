"""What a probe tells metrics, and what it tells a steered rhythm."""

import json
import math

import pytest

from copd_megatron.steering.readings import Estimate, Reading
from copd_megatron.worker.probe import Findings

STATS = {"overlap/0": 0.8, "overlap_square/0": 0.65, "symkl/0": 0.3, "kl_forward/0": 0.2, "kl_forward_square/0": 0.05}


def test_every_measurement_becomes_a_metric_and_an_estimate_of_its_edge():
    found = Findings()
    found.of_engines("image", low_support=0.25, count=100)
    found.of_rewards("text", [1.0, 1.0, 0.0, 1.0], {})
    found.of_rewards("image", [1.0, 0.0], {"image": None})
    found.of_policy("drift/image", STATS, 100)
    found.of_policy("teacher/image", {**STATS, "kl_forward/0": 0.1}, 25)
    found.of_policy("base", {"kl_forward/0": 0.7}, 10)
    assert found.numbers == {
        "support/image": 0.25,
        "heldout/text": 0.75,
        "heldout/image": 0.5,
        "overlap/image": 0.8,
        "symkl/image": 0.3,
        "kl_teacher/image": 0.1,
        "kl_to_base": 0.7,
    }
    reading = found.readings("text", ["image"])["text ← image"]
    assert reading.overlap.error == pytest.approx(math.sqrt((0.65 - 0.64) / 100)), "of rollouts, not of tokens"
    assert reading.low_support.error == pytest.approx(math.sqrt(0.25 * 0.75 / 100))
    assert reading.kl_teacher == Estimate(0.1, pytest.approx(math.sqrt((0.05 - 0.01) / 25)))
    assert reading.reward == Estimate(0.5, pytest.approx(0.5 / math.sqrt(2)))


def test_what_was_not_found_is_missing_in_the_reading():
    found = Findings()
    found.of_policy("drift/image", {"overlap/0": math.nan, "overlap_square/0": math.nan, "symkl/0": 0.1}, 8)
    assert found.readings("text", ["image", "video"]) == {"text ← image": Reading(), "text ← video": Reading()}


def test_readings_keep_every_bit_on_their_way():
    reading = Reading(overlap=Estimate(0.1 + 0.2, 1 / 3), reward=Estimate(2 / 3, 0.0))

    assert Reading.from_plain(json.loads(json.dumps(reading.to_plain()))) == reading
