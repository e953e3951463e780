"""The supervisor's end of its line to the zygote: orders to fork go out, and what became of the forks comes back."""

import json
import selectors
import socket
import time
from pathlib import Path
from typing import Any

_LOADING_S = 300.0  # the longest that a zygote may take to import everything


class Line:
    """A connection to the zygote of a run, whose folder in shared memory is `root`."""

    def __init__(self, root: Path):
        self.root = root
        self._socket: socket.socket | None = None
        self._buffer = b""

    def connect(self) -> None:
        """Reach the zygote, which may still be loading. Raises `OSError` if it never answers."""
        deadline = time.monotonic() + _LOADING_S
        if self._socket is not None:
            self._socket.close()
        while True:
            self._socket, self._buffer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM), b""
            try:
                self._socket.connect(str(self.root / "zygote"))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def send(self, order: dict[str, Any]) -> None:
        """Tell the zygote something (zygote.py says what it understands). Raises `OSError` when it is gone."""
        self._socket.sendall(json.dumps(order).encode() + b"\n")

    def messages(self, wait_s: float) -> list[dict[str, Any]]:
        """What the zygote says within `wait_s`. Raises `ConnectionError` when it is gone."""
        if not self._selector.select(wait_s):
            return []
        data = self._socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the zygote is gone")
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return [json.loads(line) for line in lines]
