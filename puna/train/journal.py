"""Lines at the end of a file that only this process writes: a run's metrics, and its account of samples.

A disk that is full must not stop a training. Python's own files keep a few kilobytes that could not be written, and
then raise; here lines wait in memory until there is room again, and are lost only if the process dies before.
"""

import contextlib
import os
import threading
from pathlib import Path

_AT_ONCE = 8192  # bytes that are written together, unless somebody wants them earlier


class Journal:
    """The file at `path`, made if need be. `add` writes now and then; `flush` brings all lines to the file."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting = bytearray()
        self._lock = threading.RLock()  # a signal's thread saves in the middle of a step

    def add(self, line: bytes) -> None:
        """One more line, without its end."""
        with self._lock:
            self._waiting += line + b"\n"
            if len(self._waiting) >= _AT_ONCE:
                self.flush()

    def flush(self) -> int:
        """Write what waits, as far as there is room; the length of all lines, in bytes."""
        with self._lock:
            with contextlib.suppress(OSError):  # no room: the rest waits
                while self._waiting:
                    del self._waiting[: os.write(self._descriptor, self._waiting)]
            return os.fstat(self._descriptor).st_size + len(self._waiting)

    def read(self) -> bytes:
        """All lines, also those that wait."""
        return self.path.read_bytes() + self._waiting

    def cut(self, length: int) -> None:
        """Keep the first `length` bytes; all that is whole, where lines were lost and the file is shorter."""
        with self._lock:
            written = self.flush() - len(self._waiting)
            if length > written + len(self._waiting):
                length = self.read().rfind(b"\n") + 1
            del self._waiting[max(0, length - written) :]
            os.ftruncate(self._descriptor, min(length, written))

    def close(self) -> None:
        """Write what can be written, and no more."""
        self.flush()
        os.close(self._descriptor)
