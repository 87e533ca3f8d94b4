"""The time in which an engine must keep its weights: real stores, one exchange per branch."""

from __future__ import annotations

from typing import Any

import pytest

from copd_megatron.errors import PeerLost
from copd_megatron.exchange import Exchange, Supervision, connect, serve
from copd_megatron.worker.window import Window

STEP = 7


@pytest.fixture
def conductor() -> Any:
    return serve()


def branch(conductor: Any, name: str) -> Exchange:
    exchange = connect(conductor.host, conductor.port, name)
    exchange.know(["text", "image"], 20.0)
    return exchange


def window(exchange: Exchange, point: str | None = "taught/7", wait_seconds: float = 20.0) -> Window:
    return Window(exchange, point, STEP, wait_seconds)


def test_nobody_leaves_before_all_are_done(conductor: Any) -> None:
    text, image = window(branch(conductor, "text")), window(branch(conductor, "image"))
    assert text.order(set(), False) == ("try", None)
    assert text.order(set(), True) == ("wait", None)
    assert image.order(set(), False) == ("try", None)
    assert text.order(set(), True) == ("wait", None)
    assert image.order(set(), True) == ("leave", None)
    assert text.order(set(), True) == ("leave", None)


def test_work_that_asks_no_peer_ends_at_once(conductor: Any) -> None:
    assert window(branch(conductor, "text"), point=None).order(set(), True) == ("leave", None)


def test_the_branchs_own_engine_is_given_its_weights_again(conductor: Any) -> None:
    text = window(branch(conductor, "text"), point=None)
    assert text.order({"text"}, False) == ("renew", None)
    assert text.order(set(), True) == ("leave", None)


def test_a_peer_renews_what_its_student_has_lost_and_the_student_tries_again(conductor: Any) -> None:
    students, teachers = branch(conductor, "text"), branch(conductor, "image")
    text, image = window(students), window(teachers)
    assert text.order({"image"}, False) == ("wait", None)
    assert image.order(set(), True) == ("renew", None)
    assert text.order(set(), False) == ("wait", None), "the teacher has not said that it is done"
    assert image.order(set(), True) == ("wait", None)
    assert text.order(set(), False) == ("try", None)
    assert text.order(set(), True) == ("leave", None)
    assert image.order(set(), True) == ("leave", None)
    # What was asked for in one window is not done again in the next.
    assert window(teachers, None).order(set(), True) == ("leave", None)


def test_a_renewal_is_also_done_while_the_teacher_is_still_sampling(conductor: Any) -> None:
    students, teachers = branch(conductor, "text"), branch(conductor, "image")
    text, sampling = window(students), window(teachers, point=None)
    assert text.order({"image"}, False) == ("wait", None)
    assert sampling.order(set(), False) == ("renew", None)
    assert sampling.order(set(), True) == ("leave", None)
    assert text.order(set(), False) == ("try", None)


def test_the_bases_engine_is_nobodys_to_renew(conductor: Any) -> None:
    text = window(branch(conductor, "text"), None)
    assert text.order({"base"}, False) == ("try", None)


def test_a_teacher_that_does_not_come_back_stops_all_branches_before_the_same_step(conductor: Any) -> None:
    text = window(branch(conductor, "text"), wait_seconds=0.0)
    image = window(branch(conductor, "image"))
    order, reason = text.order({"image"}, False)
    assert order == "stop"
    assert reason is not None
    assert "the engine of image did not come back within 0 s (teacher.wait_seconds)" in reason
    assert image.order(set(), True) == ("stop", None)


def test_a_wish_to_stop_is_heard_while_waiting(conductor: Any) -> None:
    exchange = branch(conductor, "text")
    exchange.begin(STEP - 2)
    text = window(exchange)
    assert text.order(set(), True) == ("wait", None)
    Supervision(conductor, ["text", "image"]).stop()
    assert text.order(set(), True) == ("stop", None)


def test_a_lost_peer_ends_the_waiting(conductor: Any) -> None:
    text = window(branch(conductor, "text"))
    assert text.order({"image"}, False)[0] == "wait"
    Supervision(conductor, ["text", "image"]).lost("image", "exit status -9")
    with pytest.raises(PeerLost, match="exit status -9"):
        text.order(set(), False)
    with pytest.raises(PeerLost, match="exit status -9"):
        window(branch(conductor, "text"), "another").order(set(), True)
