"""A training run on many GPUs for months, event by event: what is done about what happens.

    stop -> find out who -> decide -> replace nodes -> go back to a state -> start -> did it work?

All decisions are made by the trainer's own policies: what is saved, who is suspected and when, whether and after which
wait to restart, whom to leave out, who is slow, what to do about a jump of the loss. `world.py` has the rest: the
clock, the faults, and the run while it trains. The same seed gives the same run.
"""

import dataclasses
from collections.abc import Generator

from puna.planner import account as to
from puna.planner.detection import seconds_until_suspected
from puna.planner.failures import KIND
from puna.planner.policies import RestartState, SpikeState
from puna.planner.run import HELP, PLANNED, SPIKE, STARTING, STAYED, STRAGGLER, Event, Run
from puna.planner.scenario import Scenario
from puna.planner.world import Trouble, World

__all__ = ["Event", "Run", "simulate"]


def simulate(scenario: Scenario, seed: int = 0) -> Run:
    """One run of `scenario`. Raises `MissingExtra` without SimPy."""
    return _Simulation(scenario, seed).run()


class _Simulation(World):
    def deal(self, trouble: Trouble, training: bool) -> Generator:
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

    def _fall(self, trouble: Trouble, training: bool) -> Generator:
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

    def _corrupt(self, trouble: Trouble) -> None:
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

    def _leave_in_order(self, trouble: Trouble) -> Generator:
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
