"""A training run on many GPUs for months, event by event.

    faults ---------\\
    maintenance -----> interrupt -> training -> stop, find who, decide (policies), replace, load, start -> training ...
    slow nodes -----/                  |
    corruption ----/                   +--> Account: every second by kind and cause

Five processes share a clock (SimPy). Training jumps from event to event: how many steps and saves lie between is
computed (`pace.py`), so a run of 54 days costs some hundreds of events. All decisions are made by the trainer's own
policies: what is saved, who is suspected and when, whether and after which wait to restart, whom to leave out, who
is slow, what to do about a jump of the loss.

The same seed gives the same run. Each kind of chance has a stream of its own, so that two scenarios that differ in a
policy meet faults that are as alike as can be.
"""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from puna.errors import MissingExtra
from puna.planner import account as to
from puna.planner.account import RUN, Account
from puna.planner.cluster import Cluster
from puna.planner.copies import Copies
from puna.planner.detection import seconds_until_suspected, steps_until_slow
from puna.planner.failures import KIND, Cause
from puna.planner.pace import Day, Pace
from puna.planner.policies import RestartState, SpikeState
from puna.planner.scenario import DAY_S, Scenario

PLANNED = "planned maintenance"
STRAGGLER = "slow node"
SPIKE = "jump of the loss"
STARTING = "restart that failed"
STAYED = "corruption that stayed"
HELP = "person needed"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that stopped the run, for a timeline."""

    at_s: float
    cause: str
    lost_steps: int
    down_s: float  # until steps were made again


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of one simulated run."""

    seed: int
    seconds: float
    steps: int  # that are part of the result
    step_s: float  # of one step at the usual speed
    account: Account = field(repr=False)
    events: tuple[Event, ...] = field(repr=False)
    progress: tuple[tuple[float, int], ...] = field(repr=False)  # (second, steps done), at each event
    counts: dict[str, int]  # what happened how often: unexpected and planned interruptions by cause, and more

    @property
    def effective(self) -> float:
        """Effective training time: the share of all time that went into steps that count (arXiv 2407.21783, 3.3.4)."""
        return sum(self.account.of_kind(kind) for kind in to.COUNTS) / self.seconds

    @property
    def of_undisturbed(self) -> float:
        """Steps made, as a share of those of a run to which nothing happens and that never saves."""
        return self.steps * self.step_s / self.seconds


@dataclass
class _Trouble:
    """Why training stopped, and what is known of it."""

    cause: str
    shows: str  # exit, hang, silent, planned, slow, spike
    node: int | None = None
    broken: bool = False
    domain: int = 0
    repair_h: float = 0.0


def simulate(scenario: Scenario, seed: int = 0) -> Run:
    """One run of `scenario`. Raises `MissingExtra` without SimPy."""
    return _Simulation(scenario, seed).run()


class _Simulation:
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
        self.wrong: _Trouble | None = None  # a silent corruption that is in the weights
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
        trouble = _Trouble(cause.name, cause.shows, node, broken < cause.broken, repair_h=cause.repair_h)
        if cause.shows != "silent":
            self._stop(trouble)
        elif self.pace is not None and self.wrong is None:
            # Wrong numbers while nothing trains do no harm, and in a state that is wrong already no more.
            self._stop(dataclasses.replace(trouble, shows="unnoticed"))

    def _stop(self, trouble: _Trouble) -> None:
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
            self._stop(_Trouble(PLANNED, "planned", domain=number % domains))
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
            self._stop(_Trouble(STRAGGLER, "pace"))

    def _spike(self) -> None:
        if self.pace is not None:
            self._stop(_Trouble(SPIKE, "spike"))

    # --- the run

    def _job(self) -> Generator:
        while True:
            trouble, training = (yield from self._train()), True
            while trouble is not None:
                try:
                    yield from self._deal(trouble, training)
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

    def _agenda(self) -> tuple[int, _Trouble | None]:
        """The next step at which the run itself will notice something, and what."""
        found: list[tuple[int, _Trouble]] = []
        if self.wrong is not None and self.found_at is not None:
            found.append((max(self.found_at, self.step + 1), self.wrong))
        for node, ratio in self.slow.items():
            if self.cluster.takes_part(node) and node not in self.tolerated:
                steps = steps_until_slow(self.scenario.straggler, ratio)
                if steps is not None:
                    found.append((self.step + steps, _Trouble(STRAGGLER, "slow", node)))
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

    # --- dealing with it

    def _deal(self, trouble: _Trouble, training: bool) -> Generator:
        if trouble.shows == "pace":
            return
        if trouble.shows == "unnoticed":
            self._corrupt(dataclasses.replace(trouble, shows="silent"))
            return
        if trouble.shows == "slow" and not self.cluster.fit_spares(self.now):
            self.tolerated.add(trouble.node)
            return
        if self.stopped is None:
            self.stopped = (self.now, trouble.cause, self.step)
        if trouble.shows == "spike":
            yield from self._judge()
            return
        if trouble.shows in ("planned", "slow"):
            yield from self._leave_in_order(trouble)
        else:
            yield from self._fall(trouble, training)
        yield from self._restart(trouble.cause)

    def _fall(self, trouble: _Trouble, training: bool) -> Generator:
        """A fault: notice it, stop everything, and remember who it was."""
        scenario, node = self.scenario, trouble.node
        self.counts[trouble.cause] += 1
        self.copies.fault(self.now)
        if node is not None:
            self.cluster.note(node, self.now, KIND[trouble.shows])
            self.repair_h[node] = trouble.repair_h
            if trouble.broken:
                self.cluster.broken.add(node)
            if self.streams["copies"].random() < scenario.neighbour_lost:
                self.copies.memory = None
        if trouble.shows == "silent":
            self._cure()
        else:
            seconds = seconds_until_suspected(scenario.detect, trouble.shows, training=training)
            yield from self._spend(seconds, to.DETECTING, trouble.cause)
        yield from self._spend(scenario.times.stop_s + scenario.times.diagnose_s, to.STOPPING, trouble.cause)

    def _corrupt(self, trouble: _Trouble) -> None:
        """From now on the weights are wrong, and every copy that is made of them."""
        settings = self.scenario.corruption
        self.wrong, self.right_until = trouble, self.step
        checks = [settings.hash_every_steps] if settings.hash_every_steps else []
        checks += [self.scenario.save.every_steps] if settings.before_saves else []
        if checks and self.streams["copies"].random() < settings.found:
            self.found_at = min((self.step // every + 1) * every for every in checks)
        else:
            self.counts[STAYED] += 1
            self.wrong = None

    def _cure(self) -> None:
        """A corruption was found: its copies are not to be used."""
        self.copies.distrust(self.right_until)
        self.wrong = None

    def _leave_in_order(self, trouble: _Trouble) -> Generator:
        """Planned work, or a slow node to be replaced: save, stop, and change nodes."""
        scenario, times, cause = self.scenario, self.scenario.times, trouble.cause
        planned = trouble.shows == "planned"
        if planned:
            self.counts[PLANNED] += 1
        if not planned or scenario.maintenance.notice:
            yield from self._spend(
                times.save_stall_s + times.save_write_s, to.MAINTENANCE if planned else to.SAVING, cause
            )
            if self.wrong is None:
                self.copies.save_now(self.step, self.now)
        else:
            self.copies.fault(self.now)
        yield from self._spend(times.stop_s, to.STOPPING, cause)
        if not planned:
            self.cluster.note(trouble.node, self.now, "slow")
            self._send_away([trouble.node], self._repair_s(24.0))
            return
        nodes, hours = self.cluster.domain(trouble.domain), scenario.maintenance.hours
        spares = self.cluster.fit_spares(self.now)
        if len(spares) < len(nodes):
            self.domain_back_s = self.now + hours * 3600
            return
        for node, spare in zip(nodes, spares):
            self.cluster.replace(node, spare)
        self._send_away(nodes, hours * 3600)

    def _restart(self, cause: str) -> Generator:
        """Bring the run up again, as often as it takes."""
        scenario, times = self.scenario, self.scenario.times
        while True:
            yield from self._gather(cause)
            verdict, self.restarts = scenario.restart.decide(self.restarts, self.now, self.step)
            if not verdict.go:
                self.counts[HELP] += 1
                yield from self._spend(times.person_s, to.PERSON, cause)
                self.restarts = RestartState()
            yield from self._spend(verdict.wait_s, to.RESTARTING, cause)
            in_memory = self._go_back(cause)
            load = times.memory_load_s if in_memory else times.load_s
            yield from self._spend(times.start_s + load, to.RESTARTING, cause)
            failed = [node for node in self.cluster.broken if self.cluster.takes_part(node)]
            if not failed and self.streams["restarts"].random() < scenario.restarts_work:
                return
            self.counts[STARTING] += 1
            for node in failed:
                self.cluster.note(node, self.now, "crash")
            yield from self._spend(times.stop_s + times.diagnose_s, to.STOPPING, cause)

    def _go_back(self, cause: str) -> bool:
        """Continue from the newest good state; whether it lies in memory."""
        self.step, in_memory = self.copies.newest()
        self.account.go_back(self.step, cause, STRAGGLER)
        if self.wrong is not None and self.step <= self.right_until:
            self.wrong = None  # undone by going back, before anybody noticed
        return in_memory

    def _gather(self, cause: str) -> Generator:
        """Replace the nodes that are not to take part. Only for a broken one the run waits until there is a spare."""
        cluster = self.cluster
        if self.now < self.domain_back_s:
            yield from self._spend(self.domain_back_s - self.now, to.MAINTENANCE, cause)
        found = {node for node in cluster.broken if self.streams["restarts"].random() < self.scenario.broken_found}
        swapped = False
        for node in sorted(n for n in found | self.away | cluster.unfit(self.now) if cluster.takes_part(n)):
            must = node in found or node in self.away
            if not must and not cluster.fit_spares(self.now):
                continue
            self._send_away([node], self._repair_s(self.repair_h.get(node, 24.0)))
            while not cluster.spares:
                yield from self._wait_for_node(cause)
            cluster.replace(node, (cluster.fit_spares(self.now) or cluster.spares)[0])
            swapped = True
        if swapped:
            yield from self._spend(self.scenario.times.swap_s, to.RESTARTING, cause)

    def _wait_for_node(self, cause: str) -> Generator:
        self.clock = (self.now, to.NO_NODE, cause)
        try:
            yield self.returned
        finally:
            self._stop_clock()

    def _repair_s(self, mean_h: float) -> float:
        return self.streams["nodes"].expovariate(1 / (mean_h * 3600)) if mean_h else 0.0

    def _send_away(self, nodes: list[int], seconds: float) -> None:
        leaving = [node for node in nodes if node not in self.away]
        self.away.update(leaving)
        for node in leaving:
            self.slow.pop(node, None)
            self.tolerated.discard(node)
        if leaving:
            self.env.process(self._repair(leaving, seconds))

    def _repair(self, nodes: list[int], seconds: float) -> Generator:
        yield self.env.timeout(seconds)
        self.away.difference_update(nodes)
        self.cluster.back(nodes)
        self.returned.succeed()
        self.returned = self.env.event()

    def _judge(self) -> Generator:
        """A jump of the loss, as many steps long as it lasts: what `SpikePolicy` says is done."""
        scenario, policy = self.scenario, self.scenario.spikes
        usual, jump = 1.0, 100.0
        if not self.spikes.losses:
            full = (usual,) * policy.window
            self.spikes = dataclasses.replace(self.spikes, losses=full, norms=full)
        _, self.spikes = policy.judge(self.spikes, self.step - 1, usual, usual)
        self.counts[SPIKE] += 1
        for step in range(self.step, self.step + scenario.spike_steps):
            verdict, self.spikes = policy.judge(self.spikes, step, jump, jump)
            yield from self._spend(scenario.step_s, to.LOST, SPIKE)
            if verdict.action == "again":
                verdict, self.spikes = policy.judge(self.spikes, step, jump, jump, repeated=True)
                yield from self._spend(scenario.step_s, to.LOST, SPIKE)
            self.counts[f"{SPIKE}: {verdict.action}"] += 1
            if verdict.action in ("roll_back", "lower_rate"):
                self.copies.distrust(verdict.to)
                in_memory = self._go_back(SPIKE)
                load = scenario.times.memory_load_s if in_memory else scenario.times.load_s
                yield from self._spend(load, to.RESTARTING, SPIKE)
                return
            if verdict.action == "stop":
                self.counts[HELP] += 1
                yield from self._spend(scenario.times.person_s, to.PERSON, SPIKE)
                self.spikes = SpikeState()
                return
