"""Two network namespaces with a cable between them, as root: two machines, as far as the network goes."""

from __future__ import annotations

import os
import subprocess
import time
from types import TracebackType

ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Namespaces:
    """They are there for the `with` block; `within` starts a command in the first or the second."""

    def __init__(self) -> None:
        self.names = [f"copd_{os.getpid()}_{number}" for number in (1, 2)]
        self.within = [("nsenter", f"--net=/var/run/netns/{name}") for name in self.names]

    def __enter__(self) -> Namespaces:
        for name in self.names:
            _ip("netns", "add", name)
        first, second = self.names
        _ip("-n", first, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                _ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in self.names:
            _ip("netns", "del", name)

    def cut(self, seconds: float) -> None:
        """Have the cable lead nowhere for a while."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")
        time.sleep(seconds)
        _ip("-n", self.names[1], "link", "set", "cable", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
