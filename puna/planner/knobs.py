"""One setting at a time, made better and made worse: what to change first, and which assumptions the answer hangs on.

A knob is *yours* if you can turn it (a policy, a time that engineering shortens); the others are facts about the
cluster, most of them assumed. Knobs are turned by the same factor, so that their effects can be compared: what costs
time is halved or doubled, what is a share goes to its good and bad end. Nothing is said about two knobs turned at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from puna.planner.scenario import Scenario
from puna.planner.study import (
    Change,
    Spread,
    Study,
    difference,
    notice_after,
    save_every,
    study,
    with_spares,
)


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting with a better and a worse value; either is None where there is none."""

    name: str
    yours: bool
    better: Change | None
    worse: Change | None
    shown: Callable[[Scenario], str]  # the value, for people


@dataclass(frozen=True, kw_only=True)
class Turned:
    """What turning a knob did to the effective training time, in shares of all time."""

    knob: Knob
    now: str
    better_value: str = ""
    worse_value: str = ""
    gain: Spread | None = None  # with the better value
    loss: Spread | None = None  # with the worse one, below 0

    @property
    def size(self) -> float:
        """The larger of both effects."""
        return max(abs(s.mean) if s else 0.0 for s in (self.gain, self.loss))


def _times(name: str, factor: float) -> Change:
    return lambda s: replace(s, times=replace(s.times, **{name: getattr(s.times, name) * factor}))


def _seconds(name: str) -> Callable[[Scenario], str]:
    return lambda s: f"{getattr(s.times, name):g} s"


def _time(title: str, name: str) -> Knob:
    return Knob(name=title, yours=True, better=_times(name, 0.5), worse=_times(name, 2), shown=_seconds(name))


def _field(title: str, name: str, better: float | None, worse: float | None, *, yours: bool = False) -> Knob:
    def to(value: float | None) -> Change | None:
        return None if value is None else lambda s: replace(s, **{name: value})

    return Knob(name=title, yours=yours, better=to(better), worse=to(worse), shown=lambda s: f"{getattr(s, name):.4g}")


def _factor(title: str, part: str, name: str, better: float, worse: float) -> Knob:
    def by(factor: float) -> Change:
        return lambda s: replace(
            s, **{part: replace(getattr(s, part), **{name: getattr(getattr(s, part), name) * factor})}
        )

    return Knob(
        name=title,
        yours=False,
        better=by(better),
        worse=by(worse),
        shown=lambda s: f"{getattr(getattr(s, part), name):.3g}",
    )


def _memory(every: int) -> Change:
    return lambda s: replace(s, save=replace(s.save, memory_every_steps=every))


def _memory_shown(scenario: Scenario) -> str:
    every = scenario.save.memory_every_steps
    return f"every {every} steps" if every > 1 else "every step" if every else "none"


def _broken(factor: float) -> Change:
    def change(scenario: Scenario) -> Scenario:
        causes = tuple(replace(c, broken=min(1.0, c.broken * factor)) for c in scenario.failures.causes)
        return replace(scenario, failures=replace(scenario.failures, causes=causes))

    return change


def _broken_shown(scenario: Scenario) -> str:
    table = scenario.failures
    return f"{sum(c.broken * c.count for c in table.causes) / max(table.count, 1e-9):.0%}"


def _domains(factor: float) -> Change:
    """Larger or smaller domains, visited as often as before, each node."""

    def change(scenario: Scenario) -> Scenario:
        nodes = max(1, round(scenario.maintenance.domain_nodes * factor))
        return replace(scenario, maintenance=replace(scenario.maintenance, domain_nodes=nodes))

    return change


KNOBS = (
    Knob(
        name="durable save every",
        yours=True,
        better=lambda s: save_every(s, s.save.every_steps / 2),
        worse=lambda s: save_every(s, s.save.every_steps * 2),
        shown=lambda s: f"{s.save.every_steps} steps",
    ),
    Knob(name="copies in memory", yours=True, better=_memory(1), worse=_memory(0), shown=_memory_shown),
    _time("starting processes and communicators", "start_s"),
    _time("stopping what still runs", "stop_s"),
    _time("diagnosing", "diagnose_s"),
    _time("loading from disk", "load_s"),
    _time("loading from memory", "memory_load_s"),
    _time("swapping a node", "swap_s"),
    _time("standing still for a durable save", "save_stall_s"),
    _time("writing a durable save", "save_write_s"),
    _time("standing still for a copy in memory", "memory_stall_s"),
    Knob(
        name="a hang is noticed after",
        yours=True,
        better=lambda s: notice_after(s, s.detect.step_budget_s / 2),
        worse=lambda s: notice_after(s, s.detect.step_budget_s * 2),
        shown=lambda s: f"{s.detect.step_budget_s:g} s",
    ),
    Knob(
        name="spare nodes",
        yours=True,
        better=lambda s: with_spares(s, s.spares * 2 + 1),
        worse=lambda s: with_spares(s, s.spares / 2),
        shown=lambda s: f"{s.spares}",
    ),
    Knob(
        name="nodes in a maintenance domain",
        yours=True,
        better=_domains(0.5),
        worse=_domains(2),
        shown=lambda s: f"{s.maintenance.domain_nodes}",
    ),
    Knob(
        name="points that leave a node out",
        yours=True,
        better=lambda s: replace(s, eviction=replace(s.eviction, points=s.eviction.points / 2)),
        worse=lambda s: replace(s, eviction=replace(s.eviction, points=s.eviction.points * 2)),
        shown=lambda s: f"{s.eviction.points:g}",
    ),
    Knob(
        name="failure rate",
        yours=False,
        better=lambda s: replace(s, failure_factor=s.failure_factor / 2),
        worse=lambda s: replace(s, failure_factor=s.failure_factor * 2),
        shown=lambda s: f"{s.failure_factor:g} times the table's",
    ),
    _field("restarts that come up", "restarts_work", 1.0, 0.8),
    _field("broken nodes that health checks find", "broken_found", 1.0, 0.5),
    _field("damaged durable saves", "bad_saves", 0.0, 0.05),
    _field("faults that take a neighbour's copy too", "neighbour_lost", 0.0, 0.2),
    Knob(name="faults that break a node", yours=False, better=_broken(0.5), worse=_broken(2), shown=_broken_shown),
    _factor("slow nodes per GPU and hour", "stragglers", "per_gpu_hour", 0.0, 4.0),
    _factor("lemons fail times as often", "lemons", "times", 0.5, 2.0),
    _factor("hours a domain is away", "maintenance", "hours", 0.5, 2.0),
)


def turned(scenario: Scenario, knobs: Sequence[Knob], seeds: Sequence[int]) -> Iterator[Turned]:
    """Turn one knob after the other, and back. A knob that is at its end already is not turned that way."""
    usual = study(scenario, seeds)
    for knob in knobs:
        gain, better = _effect(usual, knob.better, knob, seeds)
        loss, worse = _effect(usual, knob.worse, knob, seeds)
        yield Turned(knob=knob, now=knob.shown(scenario), better_value=better, worse_value=worse, gain=gain, loss=loss)


def _effect(usual: Study, change: Change | None, knob: Knob, seeds: Sequence[int]) -> tuple[Spread | None, str]:
    if change is None:
        return None, ""
    scenario = change(usual.scenario)
    if scenario == usual.scenario:
        return None, ""
    return difference(usual, study(scenario, seeds)), knob.shown(scenario)
