"""The guard of a run that is watched: what the training loop (puna/train/guard.py) says to resilience, and hears back.

    restore      from the newest valid state of either tier, agreed on by all ranks
    beat         where this rank is; it may be saved in the middle of a step, but not while its state changes
    judge        gradients are there: are they sound, and do the replicas still agree?
    after_step   save, beside the next step
    settle       the last step: is it sound, too?
    finished     all is on disk; memory is given back

Of the run itself the guard reads `run.position.step` alone.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from puna import config
from puna.parallel import waiting
from puna.parallel.brought import Brought
from puna.planner.policies import SpikeState, Verdict
from puna.train.resilience import board, home, sentry, signals
from puna.train.resilience.comparing import Comparing
from puna.train.resilience.keeping import Capture, Fill, Keeping
from puna.train.resilience.pace import Pace, slow
from puna.train.resilience.peers import Peers
from puna.train.resilience.recheck import Recheck, Unreliable
from puna.train.resilience.restore import Found
from puna.train.resilience.settings import ResilienceConfig
from puna.train.resilience.telling import Telling

SAFE = ("data", "backward", "evaluate")  # phases in which the state is that of whole steps


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
        brought: Brought | None = None,
        on_beat: Callable[[int, str], None] | None = None,
    ):
        self.settings, self.out = settings, Path(out)
        self.peers = peers or Peers()
        self.home = home.Home.of_rank(self.out, self.peers)
        node = self.home.node(self.peers.node)
        self.tell = Telling(self.out, self.peers)
        state = {"capture": capture, "fill": fill, "layout": layout}
        how = {"kept": settings.save.kept, "shares": self.home.supervised, **state}
        self.keeping = Keeping(self.out, node, self.peers, self.tell, **how)
        lines = board.Board(node / "board", self.peers.world)
        self.pulse = board.Pulse(
            lines,
            self.peers.rank,
            attempt=self.home.attempt,
            every_s=settings.detect.beat_every_s,
            waits=waiting.now,
        )
        self.spikes = SpikeState()
        self.pace = Pace(settings.straggler)
        most = settings.corrupt_most
        self.comparing = Comparing(self.peers, self.tell, most=most)
        self.recheck = Recheck(self.peers, self.tell, brought, every=settings.recompute_every_steps, most=most)
        self.rolling: Verdict | None = None  # a roll-back that was ordered
        self.made = True  # the last step was an update
        self.waited = {"saving": 0.0, "checking": 0.0}
        self.paces_due = False  # whether the ranks' own times are to be compared before the next update
        self.phase = "starting"
        self.run: Any = None
        self.errors = node / "errors"
        self.on_beat = on_beat  # where faults are injected

    # --- beginning and end

    def __enter__(self) -> "Guard":
        signals.answer(self.leave, self.errors, self.peers.rank)
        if self.home.by_torchrun and os.environ.get("LOCAL_RANK") == "0":
            sentry.start(self.errors.parent, self.out, self.peers.world, self.settings.detect)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        signals.ignore()
        if kind is None:
            self.pulse.end()

    def restore(self, run: Any, most: int | None = None) -> bool:
        """Fill `run` from the newest valid state; with `most`, from one of at most so many steps: a roll-back.

        False if there is none to go back to, or never was one. Raises `ArtifactError` if there were, and none is valid.
        """
        back, spikes, generation = self.rolling, self.spikes, self.keeping.generation
        self.rolling = None
        if back is not None:
            self.keeping.saver.drain()
            if not back.pass_over:
                self.keeping.forget_unverified()
            self.peers.gather(None)  # nobody looks for a state before all have forgotten
        with self.keeping.still():
            found = self.keeping.newest(most)
            if found is None:
                self.keeping.durable.refuse_to_start_over()
                return False if back else self._begin(run)
            self._fill(run, found)
            if back is not None:
                self.keeping.generation = generation + 1
            if back is not None and back.pass_over:
                self.spikes = spikes
        self.run = run
        if back is None:
            self.tell.ledger("restored", step=found.key[1], tier=found.tier)
        else:
            self.tell.ledger("rolled_back", step=found.key[1], why="data" if back.pass_over else "corruption")
        return True

    def _begin(self, run: Any) -> bool:
        """A run's very beginning is saved, too: something to go back to, and a sign that the disk takes it."""
        self.run = run
        self.tell.ledger("restored", step=0, tier="none")
        self.keeping.save(run, self._record(), durable=True, checked=self.peers.replicas > 1)
        return False

    def _fill(self, run: Any, found: Found) -> None:
        spikes = found.record.pop("guard", None)
        self.recheck.sound = min(found.record.pop("sound", 0), found.key[1])
        self.keeping.fill(run, found)
        if spikes:
            self.spikes = config.from_json(SpikeState, spikes)

    def _record(self) -> dict[str, Any]:
        """What is kept with a state, so that a run that was started again judges as before."""
        return {"guard": config.to_json(self.spikes), "sound": self.recheck.sound}

    def settle(self) -> Verdict:
        """Of the run's last step: go, or back."""
        self._settle()
        found = self._compare_if_due()
        if found is not None:
            self.rolling = replace(found, rate=self.spikes.rate)
        return self.rolling or Verdict()

    def finished(self) -> None:
        """The run is done: all saves are on disk, and memory is given back."""
        self.keeping.saver.drain()
        self.tell.ledger("end", why="finished")
        self.pulse.end()
        signals.ignore()
        self.peers.gather(None)
        if self.peers.rank == 0:
            self.home.give_back()

    # --- in a step

    def beat(self, step: int, phase: str) -> None:
        """This rank has come to `phase` of `step`."""
        if phase in SAFE:
            self.keeping.release()
        else:
            self.keeping.hold()
        if self.phase == "evaluate":
            self.tell.ledger("evaluated")
        if phase == "backward":
            self.recheck.begin(step)
        self.phase = phase
        self.pace.enter(phase)
        self.pulse.beat(step, phase)
        if self.on_beat is not None:
            self.on_beat(step, phase)

    def _settle(self) -> None:
        self._wait("saving", self.keeping.settle)
        if self.keeping.saver.newest is not None:
            seal = self.keeping.saver.newest[1]
            self.comparing.trial.note(seal.step, seal.hash)

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """What to do with the gradients of step `step`: the same on every rank."""
        self.pace.enter("judging")
        self._settle()
        self._look_for_slow_ones()
        found = self._compare_if_due() or self.comparing.agree(step, loss, norm) or self._recheck(step)
        verdict = replace(found, rate=self.spikes.rate) if found else self._judge_values(step, loss, norm)
        if verdict.action in ("go", "skip"):
            self.keeping.hold()
        if verdict.action in ("roll_back", "lower_rate"):
            self.rolling = verdict
        return verdict

    def _recheck(self, step: int) -> Verdict | None:
        """Were this step's gradients computed right by everybody?"""
        verdict = self.recheck.judge(step)
        self.waited["checking"] += self.recheck.seconds
        self.recheck.seconds = 0.0
        if self.recheck.every:
            self.keeping.durable.sound = self.recheck.sound
        if verdict is not None and verdict.action == "roll_back":
            self.keeping.forget_after(verdict.to, verdict.why)
            if self.peers.rank in self.recheck.unreliable:
                raise Unreliable(verdict.why)
            self.peers.gather(None)  # an unreliable one ends; without it there is nothing to wait for
        return verdict

    def _compare_if_due(self) -> Verdict | None:
        keeping = self.keeping
        if keeping.due is None or keeping.saver.newest is None:
            return None
        (key, keeping.due), began = (keeping.due, None), time.perf_counter()
        verdict = self.comparing.compare(key, keeping.saver.newest[1].hash)
        if verdict is None:
            keeping.memory.verify(key)
            if self.settings.save.durable(key[1]):
                keeping.publish()
        self.waited["checking"] += time.perf_counter() - began
        return verdict

    def _judge_values(self, step: int, loss: float, norm: float) -> Verdict:
        repeated = self.comparing.repeating == step
        verdict, self.spikes = self.settings.spikes.judge(self.spikes, step, loss, norm, repeated=repeated)
        self.comparing.repeating = step if verdict.action == "again" else None
        if verdict.action != "go":
            self.tell.say(f"step {step}: {verdict.why}: {verdict.action.replace('_', ' ')}")
            self.tell.ledger("verdict", step=step, action=verdict.action, why=verdict.why)
        elif repeated:
            self.tell.say(f"step {step}: the second computation was good; the first one was the machine's fault")
            self.tell.ledger("transient", step=step)
        self.made = verdict.action == "go"
        return verdict

    def after_step(self, run: Any) -> None:
        """A step is done: save as the policies say."""
        save, step = self.settings.save, run.position.step
        every = self.settings.check_every_steps
        durable = save.durable(step)
        checked = self.peers.replicas > 1 and every > 0 and (durable or step % every == 0)
        how = {"durable": durable, "checked": checked}
        self.beat(step, "saving")
        if durable or checked or (self.home.supervised and save.in_memory(step)):
            self._wait("saving", lambda: self.keeping.save(run, self._record(), **how))
        self.paces_due = self.peers.world > 1 and every > 0 and step % every == 0
        self.pace.end_step()
        self.pulse.own_s = self.pace.last_s
        spent = {name: round(seconds, 6) for name, seconds in self.waited.items() if seconds}
        self.tell.ledger("step", step=step, **({} if self.made else {"made": False}), **spent)
        self.waited = dict.fromkeys(self.waited, 0.0)

    def _look_for_slow_ones(self) -> None:
        if not self.paces_due:
            return
        self.paces_due, began = False, time.perf_counter()
        own_s, usual_s = zip(*self.peers.gather((list(self.pace.own), self.pace.usual_s)))
        self.waited["checking"] += time.perf_counter() - began
        if self.peers.rank == 0:
            for rank, score in slow(self.settings.straggler, own_s, usual_s, self.peers.stages).items():
                self.tell.slow(rank, score)

    def _wait(self, what: str, action: Callable[[], None]) -> None:
        began = time.perf_counter()
        action()
        self.waited[what] += time.perf_counter() - began

    # --- leaving early

    def leave(self) -> None:
        """Save what is done, in the middle of a step, and return: the caller ends the process."""
        if self.run is None:
            return
        step = self.run.position.step
        self.pulse.beat(step, "leaving")
        self.keeping.leave(self.run, self._record(), within_s=self.settings.leave_s / 2)
        self.tell.ledger("end", why="asked to", step=step)
