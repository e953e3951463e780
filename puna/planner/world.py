"""A simulated cluster and the run on it: the clock, what happens to the run, and the run while it trains.

    faults ---------\\
    maintenance -----> interrupt -> training -> `deal` (simulator.py) -> training -> ...
    slow nodes -----/                  |
    jumps of loss -/                   +--> Account: every second by kind and cause

These are processes on one clock (SimPy). Training jumps from event to event: how many steps and saves lie between is
computed (`pace.py`), so a run of 54 days costs some hundreds of events.

Each kind of chance has a stream of its own, so that two scenarios that differ in a policy meet faults that are as
alike as can be.
"""

import dataclasses
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass

from puna.errors import MissingExtra
from puna.planner import account as to
from puna.planner.account import RUN, Account
from puna.planner.cluster import Cluster
from puna.planner.copies import Copies
from puna.planner.detection import steps_until_slow
from puna.planner.failures import Cause
from puna.planner.pace import Day, Pace
from puna.planner.policies import RestartState, SpikeState
from puna.planner.run import PLANNED, SPIKE, STRAGGLER, Event, Run
from puna.planner.scenario import DAY_S, Scenario


@dataclass
class Trouble:
    """Something that happens to a run, and what is known of it.

    `shows` is how: a fault is an exit, a hang or, once it is found, silent; a corruption that nobody noticed yet is
    unnoticed; planned is maintenance, slow a slow node that was named, pace a run that became slower or faster, and
    spike a jump of the loss.
    """

    cause: str
    shows: str
    node: int | None = None
    broken: bool = False
    domain: int = 0
    repair_h: float = 0.0


class World(ABC):
    """One simulated run and its cluster. `deal` says what is done about what happens."""

    def __init__(self, scenario: Scenario, seed: int):
        try:
            import simpy
        except ImportError:
            raise MissingExtra("simpy", "planning") from None
        self.scenario, self.seed = scenario, seed
        self.env = simpy.Environment()
        self.interrupt = simpy.Interrupt
        self.streams = {
            name: random.Random(f"{seed} {name}") for name in ("faults", "nodes", "slow", "restarts", "copies")
        }
        self.cluster = Cluster(scenario, self.streams["nodes"])
        self.copies = Copies(scenario.save, scenario.bad_saves, self.streams["copies"])
        self.day = Day(scenario.day_and_night)
        self.account = Account()
        self.counts: Counter[str] = Counter()
        self.events: list[Event] = []
        self.progress: list[tuple[float, int]] = [(0.0, 0)]
        self.step = 0
        self.pace: Pace | None = None  # of the training under way
        self.clock = (0.0, to.RESTARTING, RUN)  # since when the time is spent on what, while nothing trains
        self.slow: dict[int, float] = {}  # node -> times as slow
        self.tolerated: set[int] = set()  # slow nodes for which there was no spare
        self.wrong: Trouble | None = None  # a silent corruption that is in the weights
        self.right_until = 0  # the newest step whose state is right
        self.found_at: int | None = None  # the step at which the corruption will be found
        self.away: set[int] = set()  # nodes under repair
        self.repair_h: dict[int, float] = {}
        self.domain_back_s = 0.0  # until when nodes that the run needs are in maintenance
        self.stopped: tuple[float, str, int] | None = None  # since when, why and at which step nothing trains
        self.restarts = RestartState()
        self.spikes = SpikeState()
        self.returned = self.env.event()

    # --- the clock

    @property
    def now(self) -> float:
        return self.env.now

    def _spend(self, seconds: float, kind: str, cause: str) -> Generator:
        """Let time pass, on the account of a kind and a cause."""
        self.clock = (self.now, kind, cause)
        try:
            yield self.env.timeout(seconds)
        finally:
            self._stop_clock()

    def _stop_clock(self) -> None:
        since, kind, cause = self.clock
        self.account.add(kind, cause, self.now - since)
        self.clock = (self.now, kind, cause)

    def run(self) -> Run:
        """From the first step until the time is over."""
        scenario = self.scenario
        self.job = self.env.process(self._job())
        if self.cluster.faults_per_s:
            self.env.process(self._faults())
        if scenario.maintenance.domain_nodes:
            self.env.process(self._maintenance())
        for rate, strike in (
            (scenario.stragglers.per_gpu_hour * scenario.gpus / 3600, self._slow_down),
            (scenario.spikes_per_day / DAY_S, self._spike),
        ):
            if rate:
                self.env.process(self._at_random(rate, strike))
        self.env.run(until=scenario.seconds)
        if self.pace is not None:
            self._end_stretch(RUN)
        else:
            self._stop_clock()
        self.progress.append((self.now, self.step))
        return Run(
            seed=self.seed,
            seconds=scenario.seconds,
            steps=self.step,
            step_s=scenario.step_s,
            account=self.account,
            events=tuple(self.events),
            progress=tuple(self.progress),
            counts=dict(self.counts),
        )

    # --- what happens to the run

    def _at_random(self, per_s: float, strike: Callable[[], None]) -> Generator:
        while True:
            yield self.env.timeout(self.streams["slow"].expovariate(per_s))
            strike()

    def _faults(self) -> Generator:
        draw = self.streams["faults"]
        causes = self.scenario.failures.causes
        weights = [cause.count for cause in causes]
        while True:
            # A rate that changes with the nodes is the rate now: an exponential wait has no memory.
            yield self.env.timeout(draw.expovariate(self.cluster.faults_per_s))
            self._strike(draw.choices(causes, weights)[0], broken=draw.random())

    def _strike(self, cause: Cause, broken: float) -> None:
        node = self.cluster.struck() if cause.node else None
        trouble = Trouble(cause.name, cause.shows, node, broken < cause.broken, repair_h=cause.repair_h)
        if cause.shows != "silent":
            self._stop(trouble)
        elif self.pace is not None and self.wrong is None:
            # Wrong numbers while nothing trains do no harm, and in a state that is wrong already no more.
            self._stop(dataclasses.replace(trouble, shows="unnoticed"))

    def _stop(self, trouble: Trouble) -> None:
        if self.job.is_alive and self.env.active_process is not self.job:
            self.job.interrupt(trouble)

    def _maintenance(self) -> Generator:
        between = self.scenario.between_planned_s
        domains = -(-self.scenario.nodes // self.scenario.maintenance.domain_nodes)
        yield self.env.timeout(between * self.streams["nodes"].random())
        number = 0
        while True:
            due = self.now
            while self.pace is None:  # nobody takes nodes from a run that is just being restarted
                yield self.env.timeout(60.0)
            self._stop(Trouble(PLANNED, "planned", domain=number % domains))
            number += 1
            yield self.env.timeout(max(0.0, due + between - self.now))

    def _slow_down(self) -> None:
        draw, settings = self.streams["slow"], self.scenario.stragglers
        node = draw.choice(self.cluster.members)
        self.slow[node] = draw.uniform(settings.least, settings.most)
        self.counts[STRAGGLER] += 1
        self.env.process(self._well_again(node, draw.expovariate(1 / (settings.hours * 3600))))
        self._change_pace()

    def _well_again(self, node: int, after_s: float) -> Generator:
        yield self.env.timeout(after_s)
        if self.slow.pop(node, None) is not None:
            self._change_pace()

    def _change_pace(self) -> None:
        if self.pace is not None:
            self._stop(Trouble(STRAGGLER, "pace"))

    def _spike(self) -> None:
        if self.pace is not None:
            self._stop(Trouble(SPIKE, "spike"))

    # --- the run

    def _job(self) -> Generator:
        while True:
            trouble, training = (yield from self._train()), True
            while trouble is not None:
                try:
                    yield from self.deal(trouble, training)
                    trouble = None
                except self.interrupt as stop:  # something fails before the last fault is dealt with
                    trouble, training = stop.cause, False

    def _train(self) -> Generator:
        """Train until something happens; what it was."""
        scenario, times = self.scenario, self.scenario.times
        if self.stopped is not None:
            since, cause, step = self.stopped
            self.events.append(Event(at_s=since, cause=cause, lost_steps=step - self.step, down_s=self.now - since))
            self.progress += [(since, step), (self.now, self.step)]
            self.stopped = None
        self.pace = Pace(
            self.step,
            scenario.step_s
            * max((self.slow[node] for node in self.slow if self.cluster.takes_part(node)), default=1.0),
            scenario.save,
            times.save_stall_s,
            times.save_write_s,
            times.memory_stall_s,
        )
        self.started = self.now
        step, trouble = self._agenda()
        try:
            if trouble is None:
                yield self.env.event()
            at = self.day.straight(self.day.bent(self.now) + self.pace.reached_s(step))
            yield self.env.timeout(max(0.0, at - self.now))
            self._end_stretch(trouble.cause, step)
        except self.interrupt as stop:
            trouble = stop.cause
            self._end_stretch(trouble.cause)
        return trouble

    def _agenda(self) -> tuple[int, Trouble | None]:
        """The next step at which the run itself will notice something, and what."""
        found: list[tuple[int, Trouble]] = []
        if self.wrong is not None and self.found_at is not None:
            found.append((max(self.found_at, self.step + 1), self.wrong))
        for node, ratio in self.slow.items():
            if self.cluster.takes_part(node) and node not in self.tolerated:
                steps = steps_until_slow(self.scenario.straggler, ratio)
                if steps is not None:
                    found.append((self.step + steps, Trouble(STRAGGLER, "slow", node)))
        return min(found, key=lambda item: item[0], default=(0, None))

    def _end_stretch(self, cause: str, step: int | None = None) -> None:
        """Training stops, after `step` if that is known: account for the time, and remember what was saved."""
        pace, self.pace = self.pace, None
        worked = self.day.bent(self.now) - self.day.bent(self.started)
        last = pace.done(worked) if step is None else step
        stalled = pace.stalled_s(worked) if step is None else worked - (step - pace.first) * pace.step_s
        usual = (last - pace.first) * self.scenario.step_s
        slow = (last - pace.first) * pace.step_s - usual
        by_day = self.now - self.started - worked
        self.account.add(to.SAVING, RUN, stalled)
        self.account.add(to.LOST, cause, worked - stalled - usual - slow)  # of the step under way
        if last > pace.first:
            self.account.trained(
                pace.first, last, {to.TRAINING: usual, to.SLOW: slow, to.DAY: by_day}, {to.SLOW: STRAGGLER}
            )
        else:
            self.account.add(to.LOST, cause, by_day)
        self.copies.made(pace, last, self.started, self.day)
        self.step = last
        self.clock = (self.now, to.RESTARTING, cause)

    @abstractmethod
    def deal(self, trouble: Trouble, training: bool) -> Generator:
        """Let pass what `trouble` costs, until the run trains again; `training` says that it did when it came."""
