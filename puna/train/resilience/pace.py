"""How fast a rank is by itself: its own time per step, without what it waited for others (puna/parallel/waiting.py).

Ranks are compared with those that do the same work: of a pipeline, with those of the same stage. A stage that one rank
has alone has a work of its own; such ranks are compared with themselves as they were when the run was started.
"""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence

from puna.parallel import waiting
from puna.planner.policies import StragglerPolicy

OWN = ("data", "backward", "update")  # phases of a step in which a rank works
_WARMING_UP = 2  # steps that say nothing: memory is taken, code is loaded


class Pace:
    """One rank's clock."""

    def __init__(self, policy: StragglerPolicy):
        waiting.watch()
        self.policy = policy
        self.own: deque[float] = deque(maxlen=policy.window)  # seconds of the last steps
        self.last_s = 0.0
        self._first: list[float] = []
        self._steps, self._sum, self._phase = 0, 0.0, ""
        self._began, self._waited = time.perf_counter(), waiting.seconds()

    def enter(self, phase: str) -> None:
        """This rank has come to another phase."""
        now, waited = time.perf_counter(), waiting.seconds()
        if self._phase in OWN:
            self._sum += max(0.0, now - self._began - (waited - self._waited))
        self._phase, self._began, self._waited = phase, now, waited

    def end_step(self) -> None:
        """A step is done."""
        self._steps += 1
        self.last_s, self._sum = self._sum, 0.0
        if self._steps <= _WARMING_UP:
            return
        self.own.append(self.last_s)
        if len(self._first) < self.policy.least:
            self._first.append(self.last_s)

    @property
    def usual_s(self) -> float:
        """Of a step, when the run was started; 0 if that is not known yet."""
        return statistics.median(self._first) if len(self._first) == self.policy.least else 0.0


def slow(
    policy: StragglerPolicy, own_s: Sequence[Sequence[float]], usual_s: Sequence[float], stages: Sequence[int]
) -> dict[int, float]:
    """Rank -> score of those that are slow, the slowest first; all arguments are by rank."""
    groups: dict[int, dict[int, Sequence[float]]] = {}
    alone: dict[int, Sequence[float]] = {}
    for rank, stage in enumerate(stages):
        groups.setdefault(stage, {})[rank] = own_s[rank]
    for group in groups.values():
        if len(group) == 1:
            ((rank, times),) = group.items()
            alone[rank] = [t / usual_s[rank] for t in times] if usual_s[rank] else []
    compared = [group for group in groups.values() if len(group) > 1] + [alone]
    return _slow_of(policy, compared)


def _slow_of(policy: StragglerPolicy, groups: list[Mapping[int, Sequence[float]]]) -> dict[int, float]:
    found = {rank: policy.scores(group)[rank] for group in groups for rank in policy.slow(group)}
    return dict(sorted(found.items(), key=lambda item: -item[1]))
