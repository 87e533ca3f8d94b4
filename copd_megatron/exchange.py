"""What branches tell each other: where they are, and that one of them is gone.

A TCPStore held by the conductor carries it (weights travel through `snapshots.py`). Only rank 0 of a gang speaks here.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import Store, TCPStore

from copd_megatron.errors import PeerLost

# Seconds between two looks at the store: short at first, because branches in lockstep arrive together.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1
_STOP = "stop"


def beat_key(branch: str, rank: int) -> str:
    """Where a rank counts its heartbeats."""
    return f"beat/{branch}/{rank}"


def dump_key(branch: str) -> str:
    """Where it is counted how often a branch's ranks were asked to print what they do."""
    return f"dump/{branch}"


def refusal_key(branch: str) -> str:
    """Where a rank says why the run cannot go on."""
    return f"refused/{branch}"


def serve(host: str = "127.0.0.1") -> TCPStore:
    """The conductor's store, on a free port of `host` and of no other address: by itself it would listen on all."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def address(host: str, port: int) -> dict[str, str]:
    """The environment in which processes of one world find each other at a store, as torchrun's workers do.

    The store is there before they are: a port that the first of them had to open could be taken by then.
    """
    return {
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


class Exchange:
    """One branch's side of the conversation."""

    def __init__(self, store: Store, me: str) -> None:
        self._store = store
        self._wait_seconds = 0.0
        self._renewed = 0
        self.me = me
        self.peers: list[str] = []

    def know(self, branches: Sequence[str], wait_seconds: float) -> None:
        """Whom to meet, and how long to wait for them."""
        self.peers = [name for name in branches if name != self.me]
        self._wait_seconds = wait_seconds

    def report(self, status: str) -> None:
        """Publish this branch's status line (JSON) for the display."""
        self._say(f"status/{self.me}", status)

    def begin(self, step: int) -> bool:
        """Say that update `step` is about to start; False if the run is to stop before it.

        The order (say, then ask) lets the conductor name a step that no branch has passed, so that all of them stop,
        and save, at the same one.
        """
        self._store.set(f"begun/{self.me}", str(step))
        return not self.stopping(step)

    def end(self, ending: str) -> None:
        """Leave a last word: "done", "interrupted", or what went wrong; on return the conductor can read it."""
        self._say(f"ending/{self.me}", ending)

    def meet(self, point: str) -> None:
        """Return when every branch has reached `point`. Raises PeerLost if one is gone or takes too long."""
        self._store.set(f"met/{point}/{self.me}", "1")
        self._await([f"met/{point}/{peer}" for peer in self.peers], f"reach {point!r}")

    def together(self, point: str) -> bool:
        """Whether every branch has reached `point`, as this one has. Raises PeerLost if one is gone."""
        self._store.set(f"met/{point}/{self.me}", "1")
        if all(self._store.check([f"met/{point}/{peer}"]) for peer in self.peers):
            return True
        self._check_peers()
        return False

    @property
    def decides(self) -> bool:
        """Whether this is the branch that decides for all: the first by name."""
        return all(self.me < peer for peer in self.peers)

    def announce(self, text: str) -> None:
        """Let the conductor know of an event of the whole run; unlike a status none is ever passed over."""
        _Queue(self._store, "event").append(f"{self.me}/{text}")

    def agree(self, point: str, word: str, decide: Callable[[dict[str, str]], str]) -> str:
        """The one decision that all branches take at `point`, from the `word` of each.

        One branch decides (`decides`) and says it; the others hear it, so that no difference between machines can make
        them differ. Raises PeerLost if a branch is gone or takes too long.
        """
        names = sorted([self.me, *self.peers])
        self._store.set(f"word/{point}/{self.me}", word)
        key = f"decided/{point}/{names[0]}"
        if self.decides:
            words = [f"word/{point}/{name}" for name in names]
            self._await(words, f"give its word on {point!r}")
            heard = {name: self._store.get(said).decode() for name, said in zip(names, words, strict=True)}
            self._store.set(key, decide(heard))
        else:
            self._await([key], f"decide {point!r}")
        return self._store.get(key).decode()

    def ask_renewal(self, peer: str) -> int:
        """Ask `peer` to hand its engine its weights once more, because that has lost them; the ticket to wait with."""
        return self._store.add(f"renewal/{peer}", 1)

    def renewed(self, peer: str, ticket: int) -> bool:
        """Whether `peer` has done so. Raises PeerLost if it is gone."""
        self._check_peers()
        key = f"renewed/{peer}"
        return bool(self._store.check([key])) and int(self._store.get(key)) >= ticket

    def renewal_asked(self) -> int | None:
        """The last ticket with which a peer asks this branch for a renewal that it has not had; None if none does."""
        asked = self._store.add(f"renewal/{self.me}", 0)
        return asked if asked > self._renewed else None

    def renewed_for(self, ticket: int) -> None:
        """Say that the engine has its weights again, for all tickets up to this one."""
        self._renewed = ticket
        self._store.set(f"renewed/{self.me}", str(ticket))

    def hung(self, server: str) -> None:
        """Tell the conductor that the server at this address has hung."""
        _Queue(self._store, "hung").append(server)

    def stop_before(self, step: int) -> None:
        """Have all branches stop before update `step`."""
        self._store.set(_STOP, str(step))

    def stopping(self, step: int) -> bool:
        """Whether the run is to stop before update `step`."""
        return bool(self._store.check([_STOP])) and step >= int(self._store.get(_STOP))

    def saved(self, step: int, entry: str) -> None:
        """Say that this branch's part of the checkpoint of `step` is on disk, and what the run's manifest needs."""
        self._store.set(f"saved/{step}/{self.me}", entry)

    def commit(self, step: int, write: Callable[[dict[str, str]], None], wait: bool) -> bool:
        """Whether the run's checkpoint of `step` counts.

        The first branch to see that all parts are on disk calls `write` with every branch's entry. With `wait` the
        answer is yes, or PeerLost if a branch is gone or takes too long.
        """
        names = sorted([self.me, *self.peers])
        keys = [f"saved/{step}/{name}" for name in names]
        if wait:
            self._await(keys, f"save step {step}")
        elif not all(self._store.check([key]) for key in keys):
            return False
        if self._store.add(f"committing/{step}", 1) == 1:
            write({name: self._store.get(key).decode() for name, key in zip(names, keys, strict=True)})
            self._store.set(f"committed/{step}/the run", "1")
            return True
        if wait:
            self._await([f"committed/{step}/the run"], f"commit the checkpoint of step {step}")
        return bool(self._store.check([f"committed/{step}/the run"]))

    def _say(self, key: str, value: str) -> None:
        # `set` returns when the bytes are on their way. The answer to a question on the same connection says that they
        # have arrived: a process that ends right after this leaves its word behind.
        self._store.set(key, value)
        self._store.check([key])

    def _await(self, keys: list[str], what: str) -> None:
        deadline = time.monotonic() + self._wait_seconds
        pause = _SHORTEST_PAUSE
        while True:
            missing = [key for key in keys if not self._store.check([key])]
            if not missing:
                return
            self._check_peers()
            if time.monotonic() > deadline:
                names = ", ".join(key.rsplit("/", 1)[1] for key in missing)
                raise PeerLost(
                    f"branch {self.me!r} stops: {names} did not {what} within {self._wait_seconds:g} s "
                    "(teacher.wait_seconds)"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _check_peers(self) -> None:
        for peer in self.peers:
            if self._store.check([f"lost/{peer}"]):
                reason = self._store.get(f"lost/{peer}").decode()
                raise PeerLost(f"branch {self.me!r} stops: its peer {peer!r} is gone ({reason})")


def reach(host: str, port: int) -> TCPStore:
    """The conductor's store, from another process."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))


def connect(host: str, port: int, me: str) -> Exchange:
    """The side of branch `me`, connected to the conductor's store."""
    return Exchange(reach(host, port), me)


class _Queue:
    """Entries that many append and one reads, in order and each once. Reading waits for nobody: a writer may die."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._read = 0

    def append(self, entry: str) -> None:
        self._store.set(f"{self._name}/{self._store.add(f'{self._name}s', 1)}", entry)

    def new(self) -> list[str]:
        """What was appended since the last call."""
        found = []
        while self._store.check([key := f"{self._name}/{self._read + 1}"]):
            found.append(self._store.get(key).decode())
            self._read += 1
        return found


class Supervision:
    """The conductor's side: read what branches say, and tell them to stop."""

    def __init__(self, store: Store, branches: Sequence[str]) -> None:
        self._store = store
        self._branches = branches
        self._hung = _Queue(store, "hung")
        self._events = _Queue(store, "event")

    def statuses(self) -> dict[str, str]:
        """The newest status line of each branch that has sent one."""
        return {
            name: self._store.get(f"status/{name}").decode()
            for name in self._branches
            if self._store.check([f"status/{name}"])
        }

    def ending(self, branch: str) -> str | None:
        """A branch's last word, None if it has not left one."""
        return self._store.get(f"ending/{branch}").decode() if self._store.check([f"ending/{branch}"]) else None

    def refusal(self, branch: str) -> str | None:
        """Why a rank of `branch` says that the run cannot go on, None if none does."""
        return self._store.get(refusal_key(branch)).decode() if self._store.check([refusal_key(branch)]) else None

    def beats(self, branch: str, world: int) -> dict[int, int]:
        """The newest heartbeat of each of a branch's ranks that has begun to beat."""
        keys = {rank: beat_key(branch, rank) for rank in range(world)}
        if not self._store.check([*keys.values()]):  # all at once where all are there: one question
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        beats = self._store.multi_get([*keys.values()]) if keys else []
        return {rank: int(beat) for rank, beat in zip(keys, beats, strict=True)}

    def ask_for_stacks(self, branch: str) -> None:
        """Have every rank of `branch` that can still do so print what it is doing, into the branch's log."""
        self._store.add(dump_key(branch), 1)

    def hung(self) -> list[str]:
        """Addresses of servers that branches have reported since the last call as hung."""
        return self._hung.new()

    def events(self) -> list[tuple[str, str]]:
        """(branch, text) of everything announced since the last call, in order."""
        told = [entry.partition("/") for entry in self._events.new()]
        return [(branch, text) for branch, _, text in told]

    def lost(self, branch: str, reason: str) -> None:
        """Tell the others that a branch is gone."""
        self._store.set(f"lost/{branch}", reason)

    def stop(self) -> int:
        """Ask all branches to stop before the same update; return its number.

        Two steps of margin: one that the fastest branch has begun, one that it may begin while this is being said.
        """
        begun = [
            int(self._store.get(f"begun/{name}")) for name in self._branches if self._store.check([f"begun/{name}"])
        ]
        last = max(begun, default=-1) + 2
        self._store.set(_STOP, str(last))
        return last
