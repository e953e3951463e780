"""One scenario, many seeds: how much of the time trains, with an interval; what each cause cost; what to change first.

Two intervals are not to be confused. A run happens once, so `low` and `high` bound nine of ten *runs*; `error` is how
well the mean itself is known, and shrinks with more seeds. Comparisons use the same seeds on both sides and the error
of the pairs' differences, in which most of the chance cancels.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from puna.planner import account as to
from puna.planner.scenario import Scenario
from puna.planner.simulator import Run, simulate

Change = Callable[[Scenario], Scenario]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number over runs: its mean, the error of that mean (one standard deviation), and where nine of ten runs lie."""

    mean: float
    error: float
    low: float
    high: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """The `Spread` of at least one value."""
    ordered = sorted(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Spread(
        mean=statistics.fmean(values),
        error=error,
        low=_quantile(ordered, 0.05),
        high=_quantile(ordered, 0.95),
        n=len(values),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    left = math.floor(place)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] + (place - left) * (ordered[right] - ordered[left])


@dataclass(frozen=True, kw_only=True)
class Study:
    """Runs of one scenario with different seeds."""

    scenario: Scenario
    runs: tuple[Run, ...]

    @property
    def effective(self) -> Spread:
        """Effective training time, a share."""
        return spread([run.effective for run in self.runs])

    @property
    def of_undisturbed(self) -> Spread:
        """Steps made, as a share of those of a run that nothing disturbs."""
        return spread([run.of_undisturbed for run in self.runs])

    @property
    def interruptions(self) -> Spread:
        """Unexpected interruptions of a run."""
        causes = {cause.name for cause in self.scenario.failures.causes}
        return spread([float(sum(n for name, n in run.counts.items() if name in causes)) for run in self.runs])

    def count(self, name: str) -> float:
        """How often something happened in a run, on average."""
        return statistics.fmean(run.counts.get(name, 0) for run in self.runs)

    def share(self, *, kind: str | None = None, cause: str | None = None) -> float:
        """The mean share of the time that went to a kind, to a cause, or to both together."""
        total = sum(
            seconds
            for run in self.runs
            for (k, c), seconds in run.account.seconds.items()
            if kind in (None, k) and cause in (None, c)
        )
        return total / sum(run.seconds for run in self.runs)

    def costs(self) -> list[tuple[str, float, float]]:
        """What each cause cost: (cause, times it happened in a run, share of the time), the dearest first.

        Saves cost too, and appear under the run itself; so does the day's warmth. Neither is a share of training.
        """
        causes = {
            cause for run in self.runs for (kind, cause) in run.account.seconds if kind not in (to.TRAINING, to.DAY)
        }
        rows = []
        for cause in causes:
            seconds = self.share(cause=cause) - sum(
                self.share(cause=cause, kind=kind) for kind in (to.TRAINING, to.DAY)
            )
            rows.append((cause, self.count(cause), seconds))
        return sorted(rows, key=lambda row: -row[2])


def study(scenario: Scenario, seeds: Iterable[int]) -> Study:
    """Simulate `scenario` once for each seed. Raises `MissingExtra` without SimPy."""
    return Study(scenario=scenario, runs=tuple(simulate(scenario, seed) for seed in seeds))


def difference(before: Study, after: Study) -> Spread:
    """How much more effective `after` is, seed by seed."""
    return spread([b.effective - a.effective for a, b in zip(before.runs, after.runs)])


# --- sweeps


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One setting, varied: what is set for each value, and what came out."""

    name: str
    unit: str
    points: tuple[tuple[float, Study], ...] = ()

    @property
    def best(self) -> tuple[float, Study]:
        """The value with the most effective time."""
        return max(self.points, key=lambda point: point[1].effective.mean)


def save_every(scenario: Scenario, steps: float) -> Scenario:
    """`scenario` with a durable save every `steps` steps (rounded)."""
    return replace(scenario, save=replace(scenario.save, every_steps=max(1, round(steps))))


def notice_after(scenario: Scenario, seconds: float) -> Scenario:
    """`scenario` with hangs noticed after about `seconds`, and silent processes no later than that."""
    detect = scenario.detect
    silent = min(detect.beat_timeout_s, seconds)
    beat = min(detect.beat_every_s, silent / 2)
    start = max(detect.start_budget_s, seconds)
    detect = replace(detect, step_budget_s=seconds, beat_timeout_s=silent, beat_every_s=beat, start_budget_s=start)
    return replace(scenario, detect=detect)


def restart_in(scenario: Scenario, seconds: float) -> Scenario:
    """`scenario` with `seconds` for starting processes and communicators."""
    return replace(scenario, times=replace(scenario.times, start_s=seconds))


def with_spares(scenario: Scenario, nodes: float) -> Scenario:
    """`scenario` with so many spare nodes."""
    return replace(scenario, spares=max(0, round(nodes)))


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A setting that can be swept: how it is set, and the values that are tried if none are given."""

    title: str
    unit: str
    change: Callable[[Scenario, float], Scenario]
    values: Callable[[Scenario], Sequence[float]]


AXES = {
    "checkpoint": Axis(
        title="Durable save every",
        unit="steps",
        change=save_every,
        values=lambda scenario: (5, 10, 20, 50, 100, 200, 500, 1000),
    ),
    "spares": Axis(
        title="Spare nodes",
        unit="nodes",
        change=with_spares,
        values=lambda scenario: tuple(
            sorted({round(scenario.nodes * s) for s in (0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1)})
        ),
    ),
    "detection": Axis(
        title="A hang is noticed after",
        unit="s",
        change=notice_after,
        values=lambda scenario: (5, 10, 30, 60, 100, 300, 600, 1800),
    ),
    "restart": Axis(
        title="Starting takes",
        unit="s",
        change=restart_in,
        values=lambda scenario: (5, 15, 60, 120, 300, 600, 1200),
    ),
}


def sweep(
    scenario: Scenario, axis: Axis, values: Sequence[float], seeds: Sequence[int]
) -> Iterator[tuple[float, Study]]:
    """Simulate `scenario` with each value of `axis`, one after the other."""
    for value in values:
        yield value, study(axis.change(scenario, value), seeds)
