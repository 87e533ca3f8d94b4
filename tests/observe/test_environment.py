"""The record of software and hardware."""

from __future__ import annotations

from pathlib import Path

import pytest

from copd_megatron import __version__
from copd_megatron.errors import CopdError
from copd_megatron.observe import environment
from copd_megatron.observe.environment import read_environments, record_environment


def test_resume_is_recorded_only_if_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_environment(tmp_path)
    record_environment(tmp_path)
    (entry,) = read_environments(tmp_path)
    assert entry["packages"]["copd-megatron"] == __version__
    assert entry["machine"]["gpus"]
    monkeypatch.setattr(environment, "__version__", "9.9.9")
    record_environment(tmp_path)
    assert [entry["packages"]["copd-megatron"] for entry in read_environments(tmp_path)] == [__version__, "9.9.9"]


@pytest.mark.parametrize("content", ["{", "{}", '[{"packages": {}}]'])
def test_damaged_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(CopdError, match=r"environment\.json"):
        read_environments(tmp_path)
