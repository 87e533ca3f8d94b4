"""Who teaches whom."""

import pytest

from copd_megatron.config.branches import Edge
from copd_megatron.topology import edges_of

THREE = ["text", "image", "video"]


def test_pair_is_both_directions():
    assert set(edges_of("pair", ["text", "image"])) == {("text", "image"), ("image", "text")}


def test_hub_is_the_first_branch_and_spokes_do_not_meet():
    edges = set(edges_of("hub", THREE))
    assert edges == {("text", "image"), ("image", "text"), ("text", "video"), ("video", "text")}


def test_mesh_has_every_ordered_pair():
    assert len(set(edges_of("mesh", THREE))) == 6


def test_ring_gives_each_branch_one_teacher():
    assert edges_of("ring", THREE) == (("text", "image"), ("image", "video"), ("video", "text"))


def test_list_of_edges_may_be_one_way():
    assert edges_of([Edge(student="text", teacher="image")], ["text", "image"]) == (("text", "image"),)


@pytest.mark.parametrize(
    ("topology", "branches", "message"),
    [
        ("star", ["text", "image"], "unknown preset 'star'"),
        ("pair", THREE, "needs two branches"),
        ([Edge(student="text", teacher="sound")], ["text", "image"], "unknown branch 'sound'"),
        ([Edge(student="text", teacher="text")], ["text", "image"], "cannot teach itself"),
        ([Edge(student="text", teacher="image")] * 2, ["text", "image"], "given twice"),
    ],
)
def test_impossible_topologies_are_refused(topology, branches, message):
    with pytest.raises(ValueError, match=message):
        edges_of(topology, branches)
