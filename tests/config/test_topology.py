"""Who teaches whom."""

import pytest

from copd_megatron.config.branches import Edge, Hub
from copd_megatron.topology import edges_of, untaught

THREE = ["text", "image", "video"]


def test_pair_is_both_directions():
    assert set(edges_of("pair", ["text", "image"])) == {("text", "image"), ("image", "text")}


def test_hub_is_the_first_branch_and_spokes_do_not_meet():
    edges = set(edges_of("hub", THREE))
    assert edges == {("text", "image"), ("image", "text"), ("text", "video"), ("video", "text")}


def test_hub_can_be_named():
    edges = set(edges_of(Hub(hub="video"), THREE))
    assert edges == {("text", "video"), ("video", "text"), ("image", "video"), ("video", "image")}


def test_branch_without_a_teacher_is_allowed_and_known():
    edges = edges_of([Edge(student="text", teacher="image"), Edge(student="image", teacher="text")], THREE)
    assert untaught(edges, THREE) == ("video",)
    assert untaught(edges_of("ring", THREE), THREE) == ()
    assert untaught((), THREE) == (), "nobody is singled out where nobody is taught"


def test_edges_may_form_a_cycle():
    edges = [
        Edge(student=one, teacher=other) for one, other in (("text", "image"), ("image", "video"), ("video", "text"))
    ]
    assert len(edges_of(edges, THREE)) == 3


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
        (Hub(hub="sound"), THREE, "unknown hub 'sound'; the branches are text, image, video"),
        ([Edge(student="text", teacher="text")], ["text", "image"], "cannot teach itself"),
        ([Edge(student="text", teacher="image")] * 2, ["text", "image"], "given twice"),
    ],
)
def test_impossible_topologies_are_refused(topology, branches, message):
    with pytest.raises(ValueError, match=message):
        edges_of(topology, branches)
