"""What branches tell each other, with real stores and threads in the place of processes."""

import subprocess
import sys
import threading
import time

import psutil
import pytest
import torch

from copd_megatron.errors import PeerLost, WeightsError
from copd_megatron.exchange import Supervision, beat_key, connect, serve
from copd_megatron.supervision.switchboard import Switchboard
from copd_megatron.worker.snapshots import Snapshots

NAMES = ["text", "image"]


@pytest.fixture
def conductor():
    return serve()


def branch(conductor, name, wait_seconds=20.0):
    exchange = connect(conductor.host, conductor.port, name)
    exchange.know(NAMES, wait_seconds)
    return exchange


def test_store_listens_on_the_given_address_alone(conductor):
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == conductor.port
    ]
    assert listening == ["127.0.0.1"]


def test_nobody_passes_a_meeting_before_all_have_come(conductor):
    passed = []
    first = threading.Thread(target=lambda: (branch(conductor, "text").meet("explored/1"), passed.append(time.time())))
    first.start()
    time.sleep(0.7)
    assert not passed
    came = time.time()
    branch(conductor, "image").meet("explored/1")
    first.join(timeout=10)
    assert passed
    assert passed[0] >= came


def test_one_branch_decides_for_all_from_what_each_has_said(conductor):
    heard = []

    def decide(words):
        heard.append(words)
        return "switch"

    results = []
    texts = threading.Thread(target=lambda: results.append(branch(conductor, "text").agree("rhythm/5", "0.8", decide)))
    texts.start()
    time.sleep(0.3)
    assert not results
    results.append(branch(conductor, "image").agree("rhythm/5", "0.9", decide))
    texts.join(timeout=10)
    assert results == ["switch", "switch"]
    assert heard == [{"text": "0.8", "image": "0.9"}], "decided once"


def test_every_announcement_is_heard_once_and_in_order(conductor):
    supervision = Supervision(conductor, NAMES)
    text, image = branch(conductor, "text"), branch(conductor, "image")
    assert [text.decides, image.decides] == [False, True]
    text.announce("Phase I ended: 0.8/0.9")
    image.announce("Phase II ended")
    text.announce("Phase I ended")
    heard = [("text", "Phase I ended: 0.8/0.9"), ("image", "Phase II ended"), ("text", "Phase I ended")]
    assert supervision.events() == heard
    assert supervision.events() == []
    text.announce("the end")
    assert supervision.events() == [("text", "the end")]


def test_servers_that_hang_are_told_of_once_and_a_writer_that_died_holds_nobody_up(conductor):
    supervision = Supervision(conductor, NAMES)
    assert supervision.hung() == []
    branch(conductor, "text").hung("http://10.0.0.1:30000")
    branch(conductor, "image").hung("http://10.0.0.1:30001")
    assert supervision.hung() == ["http://10.0.0.1:30000", "http://10.0.0.1:30001"]
    assert supervision.hung() == []
    conductor.add("hungs", 1)  # died between taking its number and saying what it had to say
    began = time.monotonic()
    assert supervision.hung() == []
    assert time.monotonic() - began < 5


def test_decision_does_not_wait_for_a_lost_peer(conductor):
    supervision = Supervision(conductor, NAMES)
    threading.Timer(0.3, lambda: supervision.lost("image", "killed by signal 9")).start()
    with pytest.raises(PeerLost, match="'image' is gone"):
        branch(conductor, "text").agree("rhythm/5", "0.8", lambda words: "switch")


def test_waiting_for_a_lost_peer_ends_with_its_reason(conductor):
    supervision = Supervision(conductor, NAMES)
    threading.Timer(0.3, lambda: supervision.lost("image", "killed by signal 9")).start()
    with pytest.raises(PeerLost, match=r"'image' is gone \(killed by signal 9\)"):
        branch(conductor, "text").meet("version/3")


def test_waiting_ends_after_the_stated_time(conductor):
    with pytest.raises(PeerLost, match=r"image did not reach 'version/3' within 0\.6 s"):
        branch(conductor, "text", wait_seconds=0.6).meet("version/3")


def test_all_branches_stop_before_the_same_step(conductor):
    supervision = Supervision(conductor, NAMES)
    text, image = branch(conductor, "text"), branch(conductor, "image")
    assert text.begin(4)
    assert image.begin(2)
    assert supervision.stop() == 6
    for step in (3, 4, 5):
        assert image.begin(step)
    assert text.begin(5)
    assert not text.begin(6)
    assert not image.begin(6)


def test_one_branch_commits_and_both_learn_of_it(conductor):
    written, told = [], {}

    def save(name):
        exchange = branch(conductor, name)
        exchange.saved(5, f"part of {name}")
        told[name] = exchange.commit(5, lambda parts: (time.sleep(0.2), written.append(parts)), wait=True)

    threads = [threading.Thread(target=save, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert written == [{"text": "part of text", "image": "part of image"}]
    assert told == {"text": True, "image": True}


def test_nothing_is_committed_without_the_peers_part(conductor):
    text = branch(conductor, "text", wait_seconds=0.3)
    text.saved(5, "part of text")
    assert not text.commit(5, lambda parts: pytest.fail("committed"), wait=False)
    with pytest.raises(PeerLost, match=r"image did not save step 5 within 0\.3 s"):
        text.commit(5, lambda parts: pytest.fail("committed"), wait=True)


def test_endings_and_statuses_reach_the_conductor(conductor):
    supervision = Supervision(conductor, NAMES)
    text = branch(conductor, "text")
    assert supervision.ending("text") is None
    text.report('{"phase": "explore"}')
    text.end("done")
    assert supervision.statuses() == {"text": '{"phase": "explore"}'}
    assert supervision.ending("text") == "done"


def test_heartbeats_are_those_of_the_ranks_that_have_begun_to_beat(conductor):
    supervision = Supervision(conductor, ["text", "image"])
    assert supervision.beats("text", 3) == {}
    conductor.set(beat_key("text", 2), "7")
    assert supervision.beats("text", 3) == {2: 7}
    for rank in range(3):
        conductor.set(beat_key("text", rank), str(10 + rank))
    assert supervision.beats("text", 3) == {0: 10, 1: 11, 2: 12}
    assert supervision.beats("image", 1) == {}


def test_a_rank_beats_tells_why_the_run_cannot_go_on_and_ends_with_the_store(tmp_path):
    rank = (
        "import sys, time; from copd_megatron.worker import heartbeat\n"
        "heartbeat.connect('127.0.0.1', int(sys.argv[1]), 'text', 1).refuse('the data are wrong'); time.sleep(200)"
    )
    switchboard = Switchboard(tmp_path, ["text"], patience=5.0, log=tmp_path / "log.txt")
    supervision = Supervision(switchboard.store, ["text"])
    assert supervision.refusal("text") is None
    process = subprocess.Popen([sys.executable, "-c", rank, switchboard.address.rsplit(":", 1)[1]])
    try:
        beats = set()
        while len(beats) < 3:
            beats |= set(supervision.beats("text", 2).items())
            assert process.poll() is None
            time.sleep(0.1)
        assert {rank for rank, _ in beats} == {1}
        assert supervision.refusal("text") == "the data are wrong"
        switchboard.close()
        assert process.wait(60) == 1
    finally:
        process.kill()
        switchboard.close()


def test_snapshot_returns_the_published_bits_and_forgets_old_versions(tmp_path):
    snapshots = Snapshots(tmp_path)
    weights = {"a": torch.randn(3, 4), "b": torch.randn(5).to(torch.bfloat16)}
    snapshots.publish("text", 3, weights.items())
    snapshots.publish("text", 4, ((name, tensor + 1) for name, tensor in weights.items()))
    loaded = dict(snapshots.weights("text", 3))
    assert all(
        torch.equal(loaded[name], weights[name]) and loaded[name].dtype == weights[name].dtype for name in weights
    )
    snapshots.forget("text", keep={4})
    with pytest.raises(WeightsError, match="has not published version 3"):
        dict(snapshots.weights("text", 3))
    assert dict(snapshots.weights("text", 4)).keys() == weights.keys()
