"""Which nodes and GPUs gangs and servers get, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from cluster_runs import described
from pydantic import ValidationError

from copd_megatron.cluster.placement import NodeGroup, ServerPlace, node_groups, place
from copd_megatron.config import RunConfig

SGLANG = {"engine": "sglang", "sglang": {"transport": "broadcast"}}


def placed(config: RunConfig) -> Any:
    names = iter(f"n{number}" for number in range(1, 100))
    return place(config, {group.name: [next(names) for _ in range(group.nodes)] for group in node_groups(config)})


def test_each_branch_gets_nodes_of_its_own() -> None:
    config = described({"nodes": {"text": 2, "image": 1}, "gpus_per_node": 4}, worlds={"text": 8, "image": 4})
    placement = placed(config)
    assert placement.gangs["text"].nodes == ("n1", "n2")
    assert placement.gangs["image"].nodes == ("n3",)
    assert (placement.gangs["text"].ranks, placement.gangs["image"].ranks) == (4, 4)
    assert placement.servers == {}
    assert placement.nodes == ("n1", "n2", "n3")


def test_colocated_servers_share_the_policys_gpus_if_they_sleep() -> None:
    sleeping = {**SGLANG, "sglang": {**SGLANG["sglang"], "sleep": True, "servers": 2, "tensor_parallel": 2}}
    config = described({"nodes": 2, "gpus_per_node": 8}, worlds={"text": 16, "image": 16}, rollout=sleeping)
    servers = placed(config).servers
    assert servers["text"] == (ServerPlace("text", "n1", 0), ServerPlace("text", "n2", 0))
    assert servers["image"] == (ServerPlace("image", "n3", 0), ServerPlace("image", "n4", 0))
    assert servers["base"] == (ServerPlace("text", "n1", 2), ServerPlace("text", "n2", 2))


def test_colocated_servers_that_do_not_sleep_take_the_gpus_that_are_left() -> None:
    config = described({"gpus_per_node": 8}, worlds={"text": 6, "image": 7}, rollout=SGLANG)
    servers = placed(config).servers
    assert servers["text"] == (ServerPlace("text", "n1", 6),)
    assert servers["image"] == (ServerPlace("image", "n2", 7),)
    assert servers["base"] == (ServerPlace("text", "n1", 7),)


def test_disaggregated_servers_have_nodes_of_their_own_and_no_gpu_twice() -> None:
    rollout = {**SGLANG, "sglang": {**SGLANG["sglang"], "servers": 2, "tensor_parallel": 4}}
    config = described(
        {"placement": "disaggregated", "engine_nodes": {"text": 2, "image": 2}, "gpus_per_node": 8},
        worlds={"text": 8, "image": 8},
        rollout=rollout,
        teacher={"refresh": "phase"},
        log={"kl_to_base": False},
    )
    assert node_groups(config) == (
        NodeGroup("text", 1),
        NodeGroup("text/engines", 2),
        NodeGroup("image", 1),
        NodeGroup("image/engines", 2),
    )
    places = [home for homes in placed(config).servers.values() for home in homes]
    assert len(set(places)) == len(places) == 8
    assert {home.node for home in places} == {"n2", "n3", "n5", "n6"}


def test_without_gpus_every_node_has_room() -> None:
    config = described({}, rollout={"engine": "sglang"})
    servers = placed(config).servers
    assert [homes[0].node for homes in servers.values()] == ["n1", "n2", "n1"]


@pytest.mark.parametrize(
    ("cluster", "changes", "message"),
    [
        ({"nodes": {"text": 1}}, {}, r"cluster\.nodes: give one number for each of text, image, found \['text'\]"),
        ({"nodes": 0}, {}, "nodes: 0 is not a number of nodes"),
        ({"nodes": 2}, {"worlds": {"text": 3, "image": 2}}, "the 3 processes of branch text .* over 2 nodes evenly"),
        ({"gpus_per_node": 8}, {"worlds": {"text": 16, "image": 8}}, r"branch text has 16 processes .* it needs 2"),
        ({"placement": "disaggregated"}, {}, "it starts none .*take colocated"),
        (
            {"nodes": 2},
            {"worlds": {"text": 2, "image": 2}, "rollout": {"engine": "sglang"}},
            "take broadcast, or files",
        ),
        ({}, {"rollout": {"engine": "sglang", "sglang": {"host": "10.0.0.1"}}}, "leave it out"),
        (
            {"gpus_per_node": 8},
            {"worlds": {"text": 8, "image": 8}, "rollout": SGLANG},
            r"servers of text: 1 of 1 GPUs .* 0 more have room; set rollout\.sglang\.sleep = true",
        ),
        (
            {"gpus_per_node": 8, "placement": "disaggregated"},
            {"rollout": {"engine": "sglang", "sglang": {"transport": "files", "tensor_parallel": 8}}},
            r"servers of base: .*log\.kl_to_base = false does without",
        ),
        (
            {"gpus_per_node": 4},
            {"rollout": {"engine": "sglang", "sglang": {"tensor_parallel": 8}}},
            "a server stays on one node, which has 4 GPUs",
        ),
        (
            {"node_options": {"video": ["--constraint=x"]}},
            {},
            "video is none of this run's groups of nodes: text, image",
        ),
        ({"options": ["qos=high"]}, {}, "must look like --qos=high"),
        ({"options": ["--qos=high\n#SBATCH --uid=0"]}, {}, "must look like --qos=high"),
        ({"node_options": {"text": ["--nodes=3"]}}, {}, "is decided by the script"),
        ({"partition": "a b"}, {}, "has characters that no such name has"),
    ],
)
def test_what_cannot_be_placed_is_refused(cluster: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        described(cluster, **changes)


def test_one_machine_is_not_asked_for_nodes() -> None:
    described({"launcher": "local", "gpus_per_node": 1}, worlds={"text": 4, "image": 4})
