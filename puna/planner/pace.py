"""Steps and saves as functions of time, so that a simulation can jump over thousands of steps at once.

Between two events a run does the same again and again: a step, and after some steps a save that stalls it. How often a
save fell due between two steps is a division (a test compares it with asking `SavePolicy` at each step). At noon machines
are warm and slow: time is first bent by `Day`, and in bent time every step takes equally long.
"""

import math
from dataclasses import dataclass

from puna.planner.policies import SavePolicy

_DAY_S = 86_400.0


@dataclass(frozen=True)
class Day:
    """Speed over the day: 1 at midnight, `1 - depth` at noon, a cosine between."""

    depth: float

    def bent(self, time_s: float) -> float:
        """Seconds at full speed that do the work of the first `time_s` seconds."""
        turn = 2 * math.pi / _DAY_S
        return time_s - self.depth / 2 * (time_s - math.sin(turn * time_s) / turn)

    def straight(self, bent_s: float) -> float:
        """The inverse of `bent`."""
        if not self.depth:
            return bent_s
        time = bent_s
        for _ in range(20):
            off = self.bent(time) - bent_s
            if abs(off) < 1e-6:
                break
            time -= off / (1 - self.depth / 2)
        return time


@dataclass(frozen=True)
class Pace:
    """A stretch of training from `first` done steps on, `step_s` seconds each (slow nodes included)."""

    first: int
    step_s: float
    saves: SavePolicy
    save_stall_s: float
    save_write_s: float
    memory_stall_s: float

    def durable_saves(self, last: int) -> int:
        """Durable saves from the one after step `first + 1` to the one after step `last`."""
        return last // self.saves.every_steps - self.first // self.saves.every_steps

    def memory_saves(self, last: int) -> int:
        """Copies in memory, likewise."""
        every = self.saves.memory_every_steps
        return last // every - self.first // every if every else 0

    def stall_s(self, last: int) -> float:
        """Seconds of standing still for the saves up to and including those after step `last`."""
        return self.durable_saves(last) * self._durable_stall_s + self.memory_saves(last) * self.memory_stall_s

    @property
    def _durable_stall_s(self) -> float:
        # A save begins when the one before it is on disk: where the disk is slower than the interval, training waits.
        interval = self.saves.every_steps * self.step_s
        return self.save_stall_s + max(0.0, self.save_write_s - interval)

    def reached_s(self, last: int) -> float:
        """Seconds until step `last` is done, before any save that follows it."""
        return 0.0 if last <= self.first else (last - self.first) * self.step_s + self.stall_s(last - 1)

    def done(self, seconds: float) -> int:
        """Steps that are done after so many seconds."""
        usual = self.step_s + self._durable_stall_s / self.saves.every_steps
        if self.saves.memory_every_steps:
            usual += self.memory_stall_s / self.saves.memory_every_steps
        guess, width = self.first + int(seconds / usual), 2 * self.saves.every_steps
        low, high = max(self.first, guess - width), guess + width
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.reached_s(middle) <= seconds + 1e-9 else (low, middle - 1)
        return low

    def stalled_s(self, seconds: float) -> float:
        """Of the first `seconds`, those spent standing still for saves, a save under way included."""
        last = self.done(seconds)
        if last == self.first:
            return 0.0
        whole = self.stall_s(last - 1)
        return whole + min(seconds - self.reached_s(last), self.stall_s(last) - whole)

    def newest_durable(self, last: int, most: int) -> list[int]:
        """The steps of the last `most` durable saves that fell due after `first` and not after `last`, oldest first."""
        every = self.saves.every_steps
        newest = last // every * every
        return [s for s in range(newest - (most - 1) * every, newest + 1, every) if s > self.first]
