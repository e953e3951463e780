"""How many threads the kernels for the CPU work with: a number for the whole process.

Who says nothing gets PyTorch's number where the program uses PyTorch, and else what that would be: OMP_NUM_THREADS, or one
for each core that the process may run on.
"""

import os
import sys
from pathlib import Path

_chosen: int | None = None


def set_threads(count: int) -> None:
    """Work with `count` threads from now on, PyTorch too if it is there."""
    global _chosen
    _chosen = count
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)


def threads() -> int:
    """How many threads to work with."""
    if torch := sys.modules.get("torch"):
        return torch.get_num_threads()
    if _chosen is not None:
        return _chosen
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) else cores()


def cores() -> int:
    """The cores that this process may run on; two threads of one core count once."""
    try:
        return len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    except (AttributeError, OSError):  # not on every system
        return os.cpu_count() or 1


def _siblings(cpu: int) -> str:
    return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
