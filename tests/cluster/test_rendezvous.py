"""How ranks learn who they are and where they meet."""

from __future__ import annotations

import os

import pytest
from torch.distributed import HashStore

from copd_megatron.cluster.rendezvous import by_srun, joined
from copd_megatron.errors import CopdError
from copd_megatron.exchange import reach
from copd_megatron.supervision.processes import seats

BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
SEATS = {
    "on one machine": seats(2),
    "on one machine, within a job": [{**BATCH_SCRIPT, **seat} for seat in seats(2)],
    "by srun": [
        {"SLURM_PROCID": str(rank), "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURMD_NODENAME": f"n{rank}"}
        for rank in range(2)
    ],
}


@pytest.mark.parametrize("how", SEATS)
def test_ranks_meet_at_the_store_of_rank_0(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    conductor, environments = HashStore(), SEATS[how]
    assert {by_srun(environment) for environment in environments} == {how == "by srun"}
    found: list[dict[str, str]] = [{}, {}]
    monkeypatch.setattr(os, "environ", found[0])
    with joined(conductor, "text/a", "127.0.0.1", environments[0]):
        monkeypatch.setattr(os, "environ", found[1])
        with joined(conductor, "text/a", "127.0.0.1", environments[1]):
            reach(found[1]["MASTER_ADDR"], int(found[1]["MASTER_PORT"])).set("greeting", "1")
            assert reach(found[0]["MASTER_ADDR"], int(found[0]["MASTER_PORT"])).get("greeting") == b"1"
    assert [seen["RANK"] for seen in found] == ["0", "1"]
    assert [seen["LOCAL_RANK"] for seen in found] == ["0", "0" if how == "by srun" else "1"]
    assert {seen["WORLD_SIZE"] for seen in found} == {"2"}


def test_process_that_nobody_has_told_who_it_is_says_so() -> None:
    with pytest.raises(CopdError, match="RANK is not set: only the conductor of a run starts its ranks"):
        joined(HashStore(), "text/a", "127.0.0.1", {}).__enter__()


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(CopdError, match=r"which has no address 192\.0\.2\.1 .* set cluster\.interface"):
        joined(HashStore(), "text/a", "192.0.2.1", seats(1)[0]).__enter__()
