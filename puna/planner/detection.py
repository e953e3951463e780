"""When would the trainer's policies notice? They are asked, again and again, as the trainer asks them.

`DetectPolicy` and `StragglerPolicy` answer questions about one moment. A simulator jumps from event to event, so here
the moments in between are gone through once for each kind of fault, with the same objects, and the answer is kept.
"""

import bisect
import functools
from typing import Literal

from puna.planner.policies import Beat, DetectPolicy, StragglerPolicy


@functools.lru_cache(maxsize=256)
def seconds_until_suspected(policy: DetectPolicy, shows: Literal["exit", "hang"], *, training: bool = True) -> float:
    """Seconds from a fault until `policy` suspects somebody, asked at every heartbeat.

    Two ranks: one is dead from moment 0 (`exit`) or alive without progress (`hang`), and the other waits for it.
    """

    def suspected(beats: int) -> bool:
        now = beats * policy.beat_every_s
        dead = Beat(alive_s=0.0 if shows == "exit" else now, progress_s=0.0, progress=0)
        waits = Beat(alive_s=now, progress_s=0.0, progress=1)
        return policy.suspect(now, {0: dead, 1: waits}, training=training) is not None

    late = 1
    while not suspected(late):
        late *= 2
    # Once suspected, always suspected: the first heartbeat at which it is so lies in the last doubling.
    return policy.beat_every_s * bisect.bisect_left(range(late), True, lo=late // 2, key=suspected)


@functools.lru_cache(maxsize=4096)
def steps_until_slow(policy: StragglerPolicy, ratio: float) -> int | None:
    """Steps that a rank takes `ratio` times the usual time until `policy` calls it slow; None if it never does."""
    usual = [1.0] * policy.window
    for steps in range(1, policy.window + 1):
        mine = [*usual, *[ratio] * steps][-policy.window :]
        if policy.slow({0: mine, 1: usual, 2: usual}):
            return steps
    return None
