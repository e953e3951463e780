"""The saved states of a simulated run: on disk, where they outlive everything, and in memory, where they are newer.

A durable save exists from the moment it is written; a fault before that takes it along. Some turn out damaged when they
are read, and the next older one is used. `SavePolicy` says which are kept; besides, one a day goes to an archive, as
every long run does. Step 0 can always be made anew.
"""

import random

from puna.planner.pace import Day, Pace
from puna.planner.policies import SavePolicy
from puna.planner.scenario import DAY_S


class Copies:
    """What a run could go back to."""

    def __init__(self, policy: SavePolicy, bad_share: float, draw: random.Random):
        self.policy = policy
        self.durable: list[tuple[int, float]] = []  # (step, second at which it is on disk), oldest first
        self.archive: list[tuple[int, float]] = [(0, 0.0)]
        self.memory: int | None = None  # the newest step that is in memory
        self._bad_share = bad_share
        self._draw = draw

    def made(self, pace: Pace, last: int, started_s: float, day: Day) -> None:
        """Training at `pace` since second `started_s` came to step `last`: remember what it saved on the way."""
        for step in pace.newest_durable(last, self.policy.kept + 1):
            written = day.bent(started_s) + pace.reached_s(step) + pace.save_stall_s + pace.save_write_s
            self._add(step, day.straight(written))
        every = self.policy.memory_every_steps
        if every and last // every * every > pace.first:
            self.memory = last // every * every

    def save_now(self, step: int, now_s: float) -> None:
        """A durable save that is complete now, because the run is to stop."""
        self._add(step, now_s)

    def fault(self, now_s: float) -> None:
        """What was being written is lost."""
        self.durable = [(step, written) for step, written in self.durable if written <= now_s]

    def distrust(self, step: int) -> None:
        """States of more than `step` steps hold wrong numbers."""
        self.durable = [(saved, written) for saved, written in self.durable if saved <= step]
        self.archive = [(saved, written) for saved, written in self.archive if saved <= step]
        if self.memory is not None and self.memory > step:
            self.memory = None

    def newest(self) -> tuple[int, bool]:
        """The newest good state: its step, and whether it lies in memory. Damaged ones are thrown away."""
        while self.durable and self._draw.random() < self._bad_share:
            self.durable.pop()
        durable = (self.durable or self.archive)[-1][0]
        if self.memory is not None and self.memory >= durable:
            return self.memory, True
        return durable, False

    def _add(self, step: int, written_s: float) -> None:
        kept = [(saved, written) for saved, written in self.durable if saved != step]
        kept.append((step, written_s))
        # What supersedes an older state is a complete one: while the newest is written, one more is kept.
        complete = [saved for saved, _ in kept]
        gone = set(self.policy.superseded(complete[:-1]))
        self.durable = [(saved, written) for saved, written in kept if saved not in gone]
        if written_s - self.archive[-1][1] >= DAY_S:
            self.archive.append((step, written_s))
