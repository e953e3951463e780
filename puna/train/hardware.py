"""What the machine gives a training run: threads, a memory allocator that keeps what it has, and peak speed.

On a CPU, glibc returns every freed block over 128 KB to the kernel and then takes page faults to get it back at the
next step, which costs a quarter of the time of a small model's step; `keep_freed_memory` stops that. And it asks for
pages of 2 MB: on 4 KB pages, looking addresses up takes a tenth of a step (more on a virtual machine, where each look-up is two).
"""

import ctypes
import functools
import os
import platform
import time

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_MADV_HUGEPAGE, _LARGE_PAGE = 14, 2 << 20  # Linux
_LEAST_AHEAD = 1 << 30  # bytes of addresses that the heap takes beforehand; memory comes when it is written to

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
    """Tell glibc to keep freed blocks for reuse, and Linux to back them with large pages; elsewhere nothing is done."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)  # else blocks of 32 MB and more come from the kernel anew each time
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
    _large_pages(libc)


@functools.cache
def _large_pages(libc: ctypes.CDLL) -> None:
    """Let the heap grow by half of the machine's memory, if it is promised so much, and ask for large pages there."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes, libc.madvise.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    ahead = max(_LEAST_AHEAD, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    while ahead >= _LEAST_AHEAD:
        if grown := libc.malloc(ahead):
            first, last = -(-grown // _LARGE_PAGE) * _LARGE_PAGE, (grown + ahead) // _LARGE_PAGE * _LARGE_PAGE
            libc.madvise(first, last - first, _MADV_HUGEPAGE)  # the kernel may decline
            return libc.free(grown)
        ahead //= 2


_reached = 0.0  # FLOP/s of the fastest step so far


def peak_flops(reached: float = 0.0) -> float:
    """The most bf16 FLOP/s that one process can do, on its GPU or its threads.

    From the table for known accelerators, else the most that this process has seen: in a short measurement, which comes
    out too low while others use the machine, or in a step that `reached` more.
    """
    global _reached
    known = _known_peak()
    if known is not None:
        return known
    _reached = max(_reached, reached)
    return max(_measured_peak(), _reached)


def _known_peak() -> float | None:
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _ACCELERATOR_PEAK.items() if part in name), None)


@functools.cache
def _measured_peak() -> float:
    size = 1024
    a = torch.randn(size, size).bfloat16()
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(4):
            a @ a
        best = min(best, time.perf_counter() - started)
    return 4 * 2 * size**3 / best
