"""The board: signs of life of a node's ranks, in shared memory, so that telling and watching cost nothing.

Each rank has a line of 128 bytes, which only it writes. A thread of its own writes that the process lives; the training
writes where it is whenever it comes to another phase of a step. Times are the machine's monotonic clock, which all its
processes share.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from puna.planner.policies import Beat

_LINE = struct.Struct("<qqdddqqq32s")  # pid, attempt, alive, progressed, own seconds, progress, step, waits, phase
_SIZE = 128


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a rank said last."""

    pid: int
    attempt: int
    beat: Beat
    own_s: float  # of the last step, without waiting for others
    step: int
    phase: str


class Board:
    """The lines of all ranks of a run on this node; the file is made by whoever comes first."""

    def __init__(self, path: Path, world: int):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size < world * _SIZE:
                os.ftruncate(descriptor, world * _SIZE)
            self.memory = mmap.mmap(descriptor, world * _SIZE)
        finally:
            os.close(descriptor)
        self.world = world

    def read(self, rank: int) -> Line:
        """What `rank` said last (all zero, if it never did)."""
        pid, attempt, alive, progressed, own, progress, step, waits, phase = _LINE.unpack_from(
            self.memory, rank * _SIZE
        )
        return Line(
            pid=pid,
            attempt=attempt,
            beat=Beat(alive_s=alive, progress_s=progressed, progress=progress, waiting=bool(waits)),
            own_s=own,
            step=step,
            phase=phase.rstrip(b"\0").decode("utf-8", "replace"),
        )

    def clear(self) -> None:
        """Forget what was said: before ranks are started."""
        self.memory[:] = bytes(len(self.memory))


class Pulse:
    """A rank's pen: `beat` tells progress, and a thread tells every `every_s` seconds that the process lives."""

    def __init__(
        self, board: Board, rank: int, *, attempt: int, every_s: float, waits: Callable[[], bool] = lambda: False
    ):
        self.board, self.rank, self.attempt, self.every_s = board, rank, attempt, every_s
        self.waits = waits  # whether the training waits for other ranks at this moment
        self.progressed = time.monotonic()
        self.progress, self.step, self.phase, self.own_s = 0, -1, "starting", 0.0
        self._write()
        self._ended = threading.Event()
        threading.Thread(target=self._live, name="pulse", daemon=True).start()

    def beat(self, step: int, phase: str) -> None:
        """The training has come to `phase` of `step`."""
        self.step, self.phase = step, phase
        self.progress += 1
        self.progressed = time.monotonic()
        self._write()

    def end(self) -> None:
        """Stop telling; the last word is that all is well."""
        self.phase = "ended"
        self._write()
        self._ended.set()

    def _live(self) -> None:
        while not self._ended.wait(self.every_s):
            self._write()

    def _write(self) -> None:
        line = (
            os.getpid(),
            self.attempt,
            time.monotonic(),
            self.progressed,
            self.own_s,
            self.progress,
            self.step,
            self.waits(),
            self.phase.encode()[:32],
        )
        begin = self.rank * _SIZE
        self.board.memory[begin : begin + _LINE.size] = _LINE.pack(*line)  # at once: `pack_into` first writes zeros
