"""What the training loop says to resilience, and what it hears back. One object, a handful of calls:

    guard = Guard(config, out, capture, fill)
    guard.restore(run)                                 from the newest valid state, or False
    while ...:
        guard.beat(step, "data")                       where this rank is; "reduce" while it waits for others
        ...
        verdict = guard.judge(run, loss, norm)         gradients are there: go | again | skip | roll_back ...
        if verdict.action == "go": update
        elif verdict.action in ("roll_back", "lower_rate"): guard.roll_back(run, verdict)
        guard.after_step(run)                          `run.step` steps are done
    guard.finished()

where `...` is `run.step < steps or not guard.settled(run)`.

`capture(run)` gives the tensors of this rank and a record of plain values; `fill(run, tensors, record)` puts them back.
The guard only reads `run.step`, and `run.consumed` (samples) where the run has it. Alone or one of many, supervised or
not, the calls are the same.

A state may be saved whenever no update is under way: a signal that asks the run to end is answered from a thread, in the
middle of a step, with the state of the steps that are done.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from puna import artifacts, config, log
from puna.errors import PunaError
from puna.planner.policies import SpikeState, Verdict
from puna.train.resilience import board, home, nodes, signals
from puna.train.resilience.durable import DurableTier
from puna.train.resilience.image import Snapshot
from puna.train.resilience.ledger import Ledger
from puna.train.resilience.memory import MemoryTier
from puna.train.resilience.peers import Peers
from puna.train.resilience.replicas import Comparison, Trial, earliest
from puna.train.resilience.restore import Found, newest
from puna.train.resilience.saver import Saver
from puna.train.resilience.settings import ResilienceConfig
from puna.train.resilience.sharing import Sharing

Capture = Callable[[Any], tuple[dict[str, Tensor], dict[str, Any]]]
Fill = Callable[[Any, dict[str, Tensor], dict[str, Any]], None]


class Guard:
    """One rank's guard. Raises nothing of its own but `PunaError` where a run cannot go on."""

    def __init__(
        self,
        settings: ResilienceConfig,
        out: Path,
        capture: Capture,
        fill: Fill,
        *,
        peers: Peers | None = None,
        layout: str = "",
        catch_signals: bool = True,
    ):
        self.settings, self.out, self.capture, self.fill, self.layout = settings, Path(out), capture, fill, layout
        self.peers = peers or Peers()
        self.home = home.Home.of_rank(self.out, self.peers)
        node = self.home.node(self.peers.node)
        self.ledger = Ledger(self.out) if self.peers.rank == 0 else None
        self.durable = DurableTier(self.out / artifacts.WORK, kept=settings.save.kept)
        place = {"part": self.peers.part, "parts": self.peers.parts, "replica": self.peers.replica}
        self.memory = MemoryTier(node, **place, holds=self.peers.first_on_node)
        self.saver = Saver(self.memory, self.durable, self._note, self._sharing(node))
        lines = board.Board(node / "board", self.peers.world)
        self.pulse = board.Pulse(
            lines, self.peers.rank, attempt=self.home.attempt, every_s=settings.detect.beat_every_s
        )
        self.spikes, self.generation = SpikeState(), 0
        self.trial, self.own = Trial(), deque(maxlen=settings.straggler.window)
        self.repeating: int | None = None
        self.due: tuple[int, int] | None = None  # the state whose replicas are to be compared before the next update
        self.waited = {"saving": 0.0, "checking": 0.0}
        self.phase_began, self.own_s, self.phase = time.perf_counter(), 0.0, "starting"
        self.updating = threading.Lock()  # held while the state is between two steps
        self.changing = False
        self.run: Any = None
        if catch_signals:
            signals.answer(self.leave, node / "errors", self.peers.rank)

    def _sharing(self, node: Path) -> Sharing | None:
        """Where another node's loss would take the only copy of a part along, the ranks send theirs around."""
        neighbour = self.peers.neighbour() if self.home.supervised else None
        if neighbour is None:
            return None
        source = neighbour[1]
        place = {"part": self.peers.all_parts[source], "parts": self.peers.parts, "replica": self.peers.replicas}
        return Sharing(self.peers, MemoryTier(node, **place), to=neighbour[0], source=source)

    # --- beginning and end

    def restore(self, run: Any, *, most: int | None = None) -> bool:
        """Fill `run` from the newest valid state (of at most `most` steps); False if there never was one.

        Raises `ArtifactError` if there were states and none is valid.
        """
        self.run = run
        found = newest(self.peers, self.home.node(self.peers.node), self.durable, layout=self.layout, most=most)
        if found is None:
            self.durable.refuse_to_start_over()
            self._ledger("restored", step=0, tier="none")
            self._save(run, durable=True, checked=self.peers.replicas > 1)  # shows early that the disk takes it
            return False
        self._fill(run, found)
        self._ledger("restored", step=run.step, tier=found.tier)
        return True

    def _fill(self, run: Any, found: Found) -> None:
        record = dict(found.record)
        guard = record.pop("guard", None)
        self.fill(run, found.tensors, record)
        run.step = found.key[1]
        self.generation = found.key[0]
        if guard:
            self.spikes = config.from_json(SpikeState, guard)
        self.due = None

    def settled(self, run: Any) -> bool:
        """Is the last step safe? If its replicas differ, `run` is taken back, and has steps to make again."""
        self._settle()
        verdict = self._compare_if_due()
        if verdict is not None:
            self.roll_back(run, verdict)
        return verdict is None

    def finished(self) -> None:
        """The run is done: all saves are on disk, and memory is given back."""
        self.saver.drain()
        self._ledger("end", why="finished")
        self.pulse.end()
        signals.ignore()
        self.peers.gather(None)
        if self.peers.rank == 0:
            self.home.give_back()

    # --- in a step

    def beat(self, step: int, phase: str) -> None:
        """This rank has come to `phase` of `step`. Time in the phase `reduce` is waiting for others, not its own."""
        now = time.perf_counter()
        if self.phase != "reduce":
            self.own_s += now - self.phase_began
        self.phase_began, self.phase = now, phase
        self.pulse.beat(step, phase)

    def _settle(self) -> None:
        self._wait("saving", self.saver.settle)
        if self.saver.newest is not None:
            seal = self.saver.newest[1]
            self.trial.note(seal.step, seal.hash)

    def judge(self, run: Any, loss: float, norm: float) -> Verdict:
        """What to do with the gradients of step `run.step`. Raises `PunaError` where nothing has helped."""
        self._settle()
        verdict = self._compare_if_due() or self._judge_values(run, loss, norm)
        if verdict.action in ("go", "skip"):
            self.updating.acquire()  # the state is about to change: no save until `after_step`
            self.changing = True
        return verdict

    def _judge_values(self, run: Any, loss: float, norm: float) -> Verdict:
        repeated = self.repeating == run.step
        verdict, self.spikes = self.settings.spikes.judge(self.spikes, run.step, loss, norm, repeated=repeated)
        self.repeating = run.step if verdict.action == "again" else None
        if verdict.action == "go":
            if repeated:
                self._say(f"step {run.step}: the second computation was good; the first one was the machine's fault")
                self._ledger("transient", step=run.step)
            return verdict
        self._say(f"step {run.step}: {verdict.why}: {verdict.action.replace('_', ' ')}")
        self._ledger("verdict", step=run.step, action=verdict.action, why=verdict.why)
        if verdict.action == "stop":
            hint = (
                "look at the data of the last bad steps, or lower schedule.peak; the run continues from its last state"
            )
            raise PunaError(
                f"step {run.step}: {verdict.why}: skipping, rolling back and lowering did not help", hint=hint
            )
        return verdict

    def roll_back(self, run: Any, verdict: Verdict) -> None:
        """Fill `run` from a state of at most `verdict.to` steps; the data up to here stays passed over.

        After a wrong number on a rank (`skip_samples` 0, generation unchanged) the data is read again instead.
        """
        corrupt = verdict.why.startswith("replicas")
        consumed, spikes, generation = getattr(run, "consumed", None), self.spikes, self.generation
        self.saver.drain()
        if corrupt:
            self.memory.forget_unverified()
        self.peers.gather(None)  # nobody looks for a state before all have forgotten
        with self.updating:
            if not self._restore_at_most(run, verdict.to):
                raise PunaError(
                    f"step {run.step}: {verdict.why}; there is no state left to go back to",
                    hint="keep more states: save.kept",
                )
            if not corrupt:
                self.spikes = replace(spikes, losses=self.spikes.losses, norms=self.spikes.norms)
                self.generation = generation + 1
                if consumed is not None:
                    run.consumed = consumed + verdict.skip_samples
        self._ledger("rolled_back", step=run.step, why="corruption" if corrupt else "data")
        if not corrupt:
            self._save(run, durable=True, checked=self.peers.replicas > 1)

    def _restore_at_most(self, run: Any, most: int) -> bool:
        """Fill `run` from the newest state of at most `most` steps; the oldest there is, if all are newer."""
        node = self.home.node(self.peers.node)
        for limit in (most, None):
            found = newest(self.peers, node, self.durable, layout=self.layout, most=limit)
            if found is not None:
                self._fill(run, found)
                return True
        return False

    def after_step(self, run: Any, *, made: bool = True, **notes: Any) -> None:
        """`run.step` steps are done: save and compare as the policies say. `made`: the last one was an update."""
        self.run = run
        if self.changing:
            self.changing = False
            self.updating.release()
        save, step = self.settings.save, run.step
        every = self.settings.check_every_steps
        durable = save.durable(step)
        checked = self.peers.replicas > 1 and every > 0 and (durable or step % every == 0)
        self.beat(step, "saving")
        if durable or checked or (self.home.supervised and save.in_memory(step)):
            self._wait("saving", lambda: self._save(run, durable=durable, checked=checked))
        self.own.append(self.own_s)
        self.pulse.own_s, self.own_s = self.own_s, 0.0
        spent = {name: round(seconds, 6) for name, seconds in self.waited.items() if seconds}
        self._ledger("step", step=step, **({} if made else {"made": False}), **spent, **notes)
        self.waited = dict.fromkeys(self.waited, 0.0)

    def evaluated(self) -> None:
        """What passed since the last step was evaluation."""
        self._ledger("evaluated")

    # --- saving and comparing

    def _save(self, run: Any, *, durable: bool, checked: bool = False) -> None:
        tensors, record = self.capture(run)
        record = {**record, "guard": config.to_json(self.spikes), "layout": self.layout}
        snapshot = Snapshot(step=run.step, generation=self.generation, tensors=tensors, record=record)
        self.saver.start(snapshot, must=durable or checked)
        if checked:
            self.due = snapshot.key
        elif durable:
            self.saver.settle()
            self._publish()

    def _publish(self) -> None:
        if self.saver.newest is not None and self.peers.replica == 0:
            self.saver.publish(*self.saver.newest)

    def _compare_if_due(self) -> Verdict | None:
        if self.due is None or self.saver.newest is None:
            return None
        began = time.perf_counter()
        _, seal = self.saver.newest
        said = self.peers.gather((seal.hash, list(self.own)))
        comparison = Comparison(key=self.due, hashes=[h for h, _ in said], parts=self.peers.all_parts)
        self.due = None
        verdict = self._weigh(comparison)
        self._stragglers({rank: own for rank, (_, own) in enumerate(said)})
        self.waited["checking"] += time.perf_counter() - began
        return verdict

    def _weigh(self, comparison: Comparison) -> Verdict | None:
        wrong, step = comparison.wrong(), comparison.key[1]
        if wrong == []:
            self.memory.verify(comparison.key)
            if self.trial.times and self.trial.first:  # on all ranks or on none
                self._accuse(earliest(self.peers.gather(self.trial.first_difference())), step)
            self.trial.end()
            if self.settings.save.durable(step):
                self._publish()
            return None
        times = self.trial.begin(step)
        whose = "nobody can say whose yet" if wrong is None else f"wrong: rank {', '.join(map(str, wrong))}"
        self._say(f"replicas differ after step {step}; {whose}; making the steps since the last comparison again")
        self._ledger("fault", kind="corruption", rank=(wrong or [None])[0], step=step, why=f"replicas differ; {whose}")
        if times > self.settings.corrupt_most:
            raise PunaError(
                f"step {step} came out differently on the replicas {times} times; {whose}",
                hint="take that machine out of the run: its arithmetic is not reliable",
            )
        return Verdict(action="roll_back", to=step - 1, rate=self.spikes.rate, why=f"replicas differ after step {step}")

    def _accuse(self, ranks: list[int], step: int) -> None:
        for rank in ranks:
            node = self.peers.nodes[rank]
            self._say(
                f"rank {rank} on {node} held a wrong number after step {step}: made again, it comes out differently"
            )
            if self.peers.rank == 0:
                nodes.note(self.out, node, "corruption")
                self._ledger("accused", rank=rank, node=node, step=step, kind="corruption")

    def _stragglers(self, own: dict[int, list[float]]) -> None:
        if self.peers.rank != 0:
            return
        scores = self.settings.straggler.scores(own)
        for rank in self.settings.straggler.slow(own):
            node = self.peers.nodes[rank]
            self._ledger("slow", rank=rank, node=node, score=round(scores[rank], 3))
            nodes.note(self.out, node, "slow")

    def _wait(self, what: str, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        self.waited[what] += time.perf_counter() - began

    # --- leaving early

    def leave(self) -> None:
        """Save what is done, in the middle of a step, and return: the caller ends the process."""
        if self.run is None:
            return
        self.pulse.beat(self.run.step, "leaving")
        with self.updating:  # if an update is under way, until it is whole
            self.saver.settle()
            newest = self.saver.newest
            if newest is None or newest[1].key != (self.generation, self.run.step):
                self._save(self.run, durable=False)
                self.saver.settle()
        for slot, seal in sorted(self.memory.sealed().items(), key=lambda s: s[1].key, reverse=True)[: self._copies()]:
            if self.memory.holds and self.peers.replica == 0:
                self.saver.publish_now(slot, seal)
        self._ledger("end", why="asked to", step=self.run.step)

    def _copies(self) -> int:
        """With several parts, ranks may be a step apart: two states, of which all have one."""
        return 2 if self.peers.parts > 1 else 1

    # --- telling

    def _note(self, event: str, **values: Any) -> None:
        if event in ("save_failed", "durable"):
            self._ledger(event, **values)

    def _ledger(self, event: str, **values: Any) -> None:
        if self.ledger is not None:
            self.ledger.write(event, **values)

    def _say(self, text: str) -> None:
        if self.peers.rank == 0:
            log.warn(text)
