"""How long this process waited for others, and whether it does so now.

In a step, ranks wait for each other in every exchange: one that is slow makes all slow, and their clocks show the same.
What differs is the waiting. Whoever is slow comes last to each exchange and waits for nobody; the others wait for it. So
the time that a rank needs for itself is the time that passed, less what it waited. And where nothing moves any more, the
rank that hangs is the one that does not wait.

PyTorch waits in two places, `Work.wait` and, for exchanges within autograd and DTensor, `wait_tensor`. Both are wrapped
here, once per process, and add to a sum. Transfers count as waiting, too: they take as long on all ranks. An exchange of
a GPU is waited for on the GPU, and not seen here.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

_seconds = 0.0
_inside = False  # whether it waits at this moment
_thread: int | None = None  # only its waiting counts: other threads wait beside the training


def watch() -> None:
    """From now on, count what this thread waits."""
    global _thread
    if _thread is None and dist.is_available():
        dist.Work.wait = _counted(dist.Work.wait)
        functional.wait_tensor = _counted(functional.wait_tensor)
    _thread = threading.get_ident()


def seconds() -> float:
    """What was waited since `watch`."""
    return _seconds


def now() -> bool:
    """Whether the watched thread waits at this moment."""
    return _inside


def _counted(wait: Callable[..., Any]) -> Callable[..., Any]:
    def waiting(*arguments: Any, **named: Any) -> Any:
        global _seconds, _inside
        if threading.get_ident() != _thread:
            return wait(*arguments, **named)
        began, _inside = time.perf_counter(), True
        try:
            return wait(*arguments, **named)
        finally:
            _inside = False
            _seconds += time.perf_counter() - began

    return waiting
