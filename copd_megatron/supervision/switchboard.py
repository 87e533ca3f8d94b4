"""The process that holds the store through which branches and conductor talk: it outlives a conductor that is killed.

    python -m copd_megatron.supervision.switchboard RUN_DIR PATIENCE BRANCH …

It prints the store's address and serves until its input ends, which happens when the conductor does, however it ends.
Ranks may be at work then: it has all branches stop before the same update, as the conductor would have on Ctrl-C, and
goes when the last of them has saved and ended.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

from torch.distributed import DistError

from copd_megatron.errors import CopdError
from copd_megatron.exchange import Supervision, reach, serve
from copd_megatron.observe.events import EventLog
from copd_megatron.supervision.run_lock import wait_for_workers

_ASK_SECONDS, _ANSWER_SECONDS = 5.0, 30.0
"""How often the conductor asks whether the store is alive, and how long it waits for an answer."""


class Switchboard:
    """The conductor's handle on that process. Raises CopdError if it cannot be started."""

    def __init__(self, run_dir: Path, branches: list[str], patience: float, log: Path, host: str = "127.0.0.1") -> None:
        with open(log, "ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(run_dir), str(patience), host, *branches],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        address = self._process.stdout.readline().decode().strip()
        if not address:
            self.close()
            raise CopdError(f"the process that branches talk through did not start; its reason is at the end of {log}")
        self.address = address
        """HOST:PORT of the store."""
        host, port = address.rsplit(":", 1)
        self.store = reach(host, int(port))
        self._closed = threading.Event()
        threading.Thread(target=self._ask, args=(host, int(port)), name="switchboard", daemon=True).start()

    def _ask(self, host: str, port: int) -> None:
        """End the process when it does not answer: whoever asks it waits without end otherwise."""
        store = reach(host, port)
        while not self._closed.wait(_ASK_SECONDS):
            patience = threading.Timer(_ANSWER_SECONDS, self._process.kill)
            patience.start()
            try:
                store.add("asked", 1)
            except DistError:
                return
            finally:
                patience.cancel()

    def close(self) -> None:
        """End it now, and with it whatever still talks through it."""
        self._closed.set()
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main(arguments: list[str]) -> None:
    """Serve the store."""
    run_dir, patience, host, *branches = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    store = serve(host)
    print(f"{store.host}:{store.port}", flush=True)
    sys.stdin.buffer.read()
    step = Supervision(store, branches).stop()
    tell = EventLog(Path(run_dir))
    tell("CoPD", "failure", f"the conductor is gone: all branches save step {step} and end")
    if not wait_for_workers(Path(run_dir), float(patience)):
        tell("CoPD", "failure", f"branches that did not save and end within {float(patience):g} s are ended")


if __name__ == "__main__":
    main(sys.argv[1:])
