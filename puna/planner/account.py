"""Where every second of a run went: by what was done in it and by the cause that made it so.

Time is never added twice nor forgotten: the clock is always on one item, and the items' sum is the time that passed.
Steps first count as training. When a run goes back, the seconds of the steps that it goes back over move to `repeated`, on the
account of the cause that sent it back. The names are those of the trainer's own goodput ledger, where it has them.
"""

from collections import defaultdict
from dataclasses import dataclass

TRAINING = "training"  # at the usual speed, in steps that count
SLOW = "slow nodes"  # what steps that count took longer because of a slow node
DAY = "warm days"  # ... and because of the time of day
SAVING = "saving"  # standing still to save
LOST = "repeated"  # steps that had to be made again
DETECTING = "detecting"
STOPPING = "stopping"  # and diagnosing
RESTARTING = "restarting"
NO_NODE = "no node"  # waiting for one
PERSON = "no person"  # waiting for one
MAINTENANCE = "maintenance"
KINDS = (TRAINING, SLOW, DAY, SAVING, LOST, DETECTING, STOPPING, RESTARTING, NO_NODE, PERSON, MAINTENANCE)
COUNTS = (TRAINING, SLOW, DAY)  # time in steps that are part of the result

RUN = "the run itself"  # the cause of what no fault caused


@dataclass
class Stretch:
    """Steps `first` to `last`, made without interruption, and the seconds of each kind in `COUNTS` that they took."""

    first: int
    last: int
    seconds: dict[str, float]


class Account:
    """Seconds by (kind, cause), and the stretches of which the result consists so far."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.stretches: list[Stretch] = []

    def add(self, kind: str, cause: str, seconds: float) -> None:
        """Seconds that were spent."""
        self.seconds[kind, cause] += seconds

    def trained(self, first: int, last: int, seconds: dict[str, float], causes: dict[str, str]) -> None:
        """Steps that were made, with the seconds of each kind and the causes of kinds that have one."""
        for kind, amount in seconds.items():
            self.add(kind, causes.get(kind, RUN), amount)
        if last > first:
            self.stretches.append(Stretch(first, last, dict(seconds)))

    def go_back(self, step: int, cause: str, slow_cause: str) -> int:
        """The run continues from `step`: what it made since is lost because of `cause`. How many steps that were."""
        lost = 0
        while self.stretches and self.stretches[-1].last > step:
            stretch = self.stretches[-1]
            keep = max(stretch.first, step)
            share = (stretch.last - keep) / (stretch.last - stretch.first)
            lost += stretch.last - keep
            for kind, amount in stretch.seconds.items():
                self.add(kind, slow_cause if kind == SLOW else RUN, -share * amount)
                self.add(LOST, cause, share * amount)
                stretch.seconds[kind] = (1 - share) * amount
            stretch.last = keep
            if keep == stretch.first:
                self.stretches.pop()
        return lost

    def of_kind(self, kind: str) -> float:
        """Seconds of one kind, of all causes."""
        return sum(seconds for (k, _), seconds in self.seconds.items() if k == kind)

    def of_cause(self, cause: str) -> float:
        """Seconds that one cause cost, of all kinds."""
        return sum(seconds for (_, c), seconds in self.seconds.items() if c == cause)

    @property
    def total(self) -> float:
        """All seconds."""
        return sum(self.seconds.values())
