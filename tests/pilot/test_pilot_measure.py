"""What is measured again and what is not; the measuring itself is made up."""

from __future__ import annotations

from pathlib import Path

import pytest
from pilots import DESCRIPTION, study

from copd_megatron.pilot.measure import Measuring, read_measurement


def folder(path: Path, weights: bytes) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(weights)


@pytest.fixture
def given(tmp_path, monkeypatch):
    """A study whose base, teacher and students are there."""
    common = {**DESCRIPTION["common"], "base": str(tmp_path / "base")}
    found = study(tmp_path, common=common)
    folder(tmp_path / "base", b"base")
    for capability in ("text", "image"):
        for updates in found.measured(capability)[1:]:
            folder(found.model(0, capability, updates), f"{capability} {updates}".encode())
    made_up = {"from_base": {"kl": ((0.5, 2.0),)}}
    monkeypatch.setattr(Measuring, "_measured", lambda self, capability, folder: made_up)
    return found, common


def test_what_was_measured_is_kept(given):
    found, _ = given
    assert Measuring(found, 0).measure("image", 10)
    assert not Measuring(found, 0).measure("image", 10)
    measured = read_measurement(found.measurement(0, "image", 10))
    assert measured.from_base == {"kl": ((0.5, 2.0),)}
    assert measured.of["problems"] == 50


@pytest.mark.parametrize(
    "changes",
    [{"problems": 51}, {"overlaps": [5]}, {"data": {"mini": {"digits": 3}}}, {"rollout": {"temperature": 0.5}},
     {"opd": {"top_k": 32}}, {"eval": {"problems": 9}}],
    ids=str,
)  # fmt: skip
def test_other_settings_are_measured_again(given, tmp_path, changes):
    found, common = given
    Measuring(found, 0).measure("image", 10)
    own = {key: value for key, value in changes.items() if key in ("problems", "overlaps")}
    theirs = {key: value for key, value in changes.items() if key not in own}
    assert Measuring(study(tmp_path, common={**common, **theirs}, **own), 0).measure("image", 10)


@pytest.mark.parametrize(("capability", "updates"), [("image", 10), ("text", 20), ("image", 0)], ids=str)
def test_other_models_are_measured_again(given, capability, updates):
    """The model itself, its teacher, and the base."""
    found, _ = given
    Measuring(found, 0).measure("image", 10)
    folder(found.model(0, capability, updates), b"other")
    assert Measuring(found, 0).measure("image", 10)


def test_a_run_that_gives_less_memory_measures_the_same(given, tmp_path):
    found, common = given
    Measuring(found, 0).measure("image", 10)
    fewer = study(tmp_path, common={**common, "rollout": {"max_rows": 4}})
    assert not Measuring(fewer, 0).measure("image", 10)
