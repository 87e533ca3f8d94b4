"""Planning in the test's own process, without starting another one for each plan, and the tiny models to check it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "policy"))
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "tools"))

_counted: dict[object, object] = {}


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are counted here, each once."""
    from copd_megatron.errors import ConfigError
    from copd_megatron.plan import plan, shards

    def count(requests: Sequence[shards.ShardRequest]) -> list[shards.Shards]:
        for request in requests:
            if request not in _counted:
                answer = json.loads(json.dumps(shards.count_one(asdict(request))))
                if "error" in answer:
                    raise ConfigError(answer["error"])
                _counted[request] = shards.Shards.of(answer)
        return [_counted[request] for request in requests]  # type: ignore[misc]

    monkeypatch.setattr(plan, "count", count)
