from __future__ import annotations

import os

import gang
import pytest
import torch.distributed as dist

from copd_megatron.errors import ConfigError
from copd_megatron.policy import layout
from copd_megatron.policy.layout import Layout


def test_what_is_left_over_is_data_parallel() -> None:
    assert Layout(world=12, tp=2, pp=3).dp == 2
    assert Layout(world=12, tp=2, pp=3).replica == 6
    assert Layout(world=8, tp=2, cp=2).dp == 2
    assert Layout(world=4, tp=2, ep=4, etp=1).dp == 2, "experts are divided among replicas, which stay as many"


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"tp": 0}, r"parallel\.tp is 0"),
        ({"world": 3, "tp": 2}, "world = 3 processes cannot be divided"),
        ({"world": 6, "tp": 2, "cp": 2}, "replicas of tp × pp × cp = 4"),
        ({"world": 6, "tp": 2, "ep": 2}, "groups of experts of ep × etp × pp = 4"),
        ({"world": 2, "sequence_parallel": True}, "needs tp of at least 2"),
        ({"world": 2, "vpp": 2}, "needs pp of at least 2"),
    ],
)
def test_impossible_layouts_are_refused(degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Layout(**degrees)


def test_a_process_on_its_own_needs_no_environment_and_can_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for _ in range(2):
        layout.initialize(Layout())
        assert layout.is_replica_leader()
        assert layout.is_last_stage()
        assert (layout.data_parallel_rank(), layout.data_parallel_size()) == (0, 1)
        assert layout.broadcast_in_replica({"step": 3}) == {"step": 3}
        layout.shutdown()
        assert not dist.is_initialized()


def test_the_gang_must_have_the_layout_s_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(ConfigError, match=r"parallel\.world is 1, but 2 processes were started"):
        layout.initialize(Layout())


def roles(degrees: dict[str, int]) -> tuple[int, bool, bool, int, int, str]:
    layout.initialize(Layout(world=4, **degrees))
    rank = int(os.environ["RANK"])
    result = (
        rank,
        layout.is_replica_leader(),
        layout.is_last_stage(),
        layout.data_parallel_rank(),
        layout.data_parallel_size(),
        layout.broadcast_in_replica(f"from {rank}"),
    )
    layout.shutdown()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [{"tp": 2}, {"cp": 2}], ids=["tp", "cp"])
def test_roles_in_two_replicas_of_two(degrees: dict[str, int]) -> None:
    assert gang.run(4, roles, degrees) == [
        (0, True, True, 0, 2, "from 0"),
        (1, False, True, 0, 2, "from 0"),
        (2, True, True, 1, 2, "from 2"),
        (3, False, True, 1, 2, "from 2"),
    ]
