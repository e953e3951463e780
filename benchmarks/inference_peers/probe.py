"""How fast memory can be read just now.

On a shared or virtual machine that changes within minutes, and no decoding step can be faster than its weights can be
read; so each measurement has a reading of this probe just before it. The loop is C where there is a compiler, else
PyTorch's sum, which is a little slower.
"""

import ctypes
import itertools
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

BYTES = 1 << 30
PASSES = 5


class Probe:
    """A gigabyte, and a loop that reads it with `threads` threads."""

    def __init__(self, threads: int):
        self.memory = torch.ones(BYTES // 8, dtype=torch.int64)
        self.threads = threads
        self.read, self.kind = self._loop()

    def __call__(self) -> float:
        """GB/s, the median of a few passes."""
        seconds = []
        for _ in range(PASSES):
            began = time.perf_counter()
            self.read()
            seconds.append(time.perf_counter() - began)
        return BYTES / statistics.median(seconds) / 1e9

    def _loop(self) -> tuple[Callable[[], object], str]:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            torch.set_num_threads(self.threads)
            return self.memory.sum, "torch.sum"
        with tempfile.TemporaryDirectory() as scratch:
            library = Path(scratch) / "probe.so"
            source = Path(__file__).with_name("probe.c")
            flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
            subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
            function = ctypes.CDLL(str(library)).probe
        function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_uint64
        return lambda: function(self.memory.data_ptr(), BYTES, self.threads), "C loop"


def states(readings: list[float]) -> float | None:
    """The bandwidth that parts two states, if the readings fall into two: the middle of the widest gap between
    neighbours, where each side has a fifth of the readings and the sides' medians differ by a quarter or more. Ten readings at least."""
    if len(readings) < 10:
        return None
    ordered = sorted(readings)
    fifth = max(1, len(ordered) // 5)
    gaps = [(b - a, i) for i, (a, b) in enumerate(itertools.pairwise(ordered), 1) if fifth <= i <= len(ordered) - fifth]
    if not gaps:
        return None
    _, at = max(gaps)
    low, high = statistics.median(ordered[:at]), statistics.median(ordered[at:])
    return (ordered[at - 1] + ordered[at]) / 2 if high >= 1.25 * low else None
