"""What the machine gives a training run: threads, a memory allocator that keeps what it has, and peak speed.

On a CPU, glibc returns every freed block over 128 KB to the kernel and then takes page faults to get it back at the
next step, which costs a quarter of the time of a small model's step; `keep_freed_memory` stops that.
"""

import ctypes
import functools
import platform
import time

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_MOST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more

# bf16 dense peak of accelerators, in FLOP/s, from the vendors' data sheets
_ACCELERATOR_PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def prepare(threads: int) -> None:
    """Set this process up for training with `threads` threads (0: leave as it is). Call before the first tensor op."""
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()


def device() -> torch.device:
    """Where a run computes: this process's GPU if there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks for reuse; elsewhere nothing is done."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


@functools.cache
def peak_flops() -> float:
    """The most bf16 FLOP/s that one process can do, on its GPU or its threads.

    From the table for known accelerators, else by a short measurement.
    """
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = next((peak for part, peak in _ACCELERATOR_PEAK.items() if part in name), None)
        if known is not None:
            return known
    size = 1024
    a = torch.randn(size, size).bfloat16()
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(4):
            a @ a
        best = min(best, time.perf_counter() - started)
    return 4 * 2 * size**3 / best
