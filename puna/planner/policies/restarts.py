"""Whether to go on after a fault, after which wait, and without which nodes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class RestartState:
    """What `RestartPolicy` remembers."""

    times_s: tuple[float, ...] = ()  # of restarts within `per_s`
    step: int = -1  # the farthest that the run has come
    stuck: int = 0  # restarts since it last came farther


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Start again after `wait_s` seconds, or, if not `go`, stop and say why."""

    go: bool
    wait_s: float = 0.0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """A run that gets ahead is restarted at once; one that does not waits longer each time, and then stops."""

    budget: int = 1000  # restarts within `per_s`
    per_s: float = 86_400.0
    without_progress: int = 5  # restarts at the same step
    first_wait_s: float = 1.0  # from the second restart at the same step on
    growth: float = 2.0
    longest_wait_s: float = 300.0

    def decide(self, state: RestartState, now_s: float, step: int) -> tuple[Restart, RestartState]:
        """What to do about a fault at time `now_s` in a run whose newest step is `step`."""
        times = (*(t for t in state.times_s if now_s - t < self.per_s), now_s)
        stuck = 0 if step > state.step else state.stuck + 1
        after = RestartState(times_s=times, step=max(step, state.step), stuck=stuck)
        if len(times) > self.budget:
            return Restart(go=False, why=f"{self.budget} restarts within {self.per_s:,.0f} s were not enough"), after
        if stuck > self.without_progress:
            why = f"{self.without_progress} restarts did not bring the run past step {after.step}"
            return Restart(go=False, why=why), after
        wait = min(self.first_wait_s * self.growth ** (stuck - 1), self.longest_wait_s) if stuck else 0.0
        return Restart(go=True, wait_s=wait), after


POINTS = {"corruption": 3.0, "hang": 1.0, "killed": 1.0, "crash": 1.0, "slow": 0.5, "maintenance": 0.0}


@dataclass(frozen=True, kw_only=True)
class EvictionPolicy:
    """A node whose faults within `window_s` weigh `points` or more is left out, the worst first, up to a share of all.

    A few nodes cause most of a cluster's failures. A wrong number is worse than no number: it weighs more.
    """

    points: float = 3.0
    window_s: float = 7 * 86_400.0
    most_share: float = 0.25  # of the nodes: more is not bad nodes but something else
    weights: dict[str, float] = field(default_factory=lambda: dict(POINTS))

    def weigh(self, history: Iterable[tuple[float, str]], now_s: float) -> float:
        """The weight of a node's faults, given as (time, kind)."""
        return sum(self.weights.get(kind, 1.0) for at_s, kind in history if now_s - at_s <= self.window_s)

    def left_out(self, histories: Mapping[str, Sequence[tuple[float, str]]], now_s: float, nodes: int) -> list[str]:
        """Those of `nodes` nodes that take no part, the worst first."""
        weight = {node: self.weigh(history, now_s) for node, history in histories.items()}
        bad = sorted((node for node in weight if weight[node] >= self.points), key=lambda node: (-weight[node], node))
        return bad[: int(self.most_share * nodes)]


# --- who is slow
