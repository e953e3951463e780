"""What stands between a run and its faults, as the loop sees it.

The loop says where it is (`beat`), asks whether a step's numbers are sound (`judge`), and tells when a step is done
(`after_step`); it never knows how states are kept, who watches, or what a fault costs. `PlainGuard` is the guard of a
process without a supervisor: states on disk, Ctrl-C and SIGTERM save first, a number that is not finite stops the run.
Under a supervisor, or torchrun, it is `resilience.guard.Guard`, which does all the rest. Both keep the same states.
"""

import math
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from puna import log
from puna.artifacts import WORK
from puna.errors import PunaError
from puna.parallel.placement import Cut
from puna.planner.policies import Verdict
from puna.train import saving, state
from puna.train.resilience.home import is_supervised
from puna.train.state import Run


class Guard(Protocol):
    """What the loop calls. On every rank, in the same order."""

    def __enter__(self) -> "Guard": ...

    def __exit__(self, *error: Any) -> None: ...

    def restore(self, run: Run, most: int | None = None) -> bool:
        """Fill `run` from the newest valid state (of at most `most` steps); False if there is none to go on from."""
        ...

    def beat(self, step: int, phase: str) -> None:
        """The run has come to `phase` (data, backward, update, evaluate) of `step`."""
        ...

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        """Is the step sound? Asked before its update, again after `again`."""
        ...

    def after_step(self, run: Run) -> None:
        """A step is done: save as the policy says. Raises `KeyboardInterrupt` when the run is to end, after saving."""
        ...

    def settle(self) -> Verdict:
        """Is the last step of all sound, too? Go, or roll back."""
        ...

    def finished(self) -> None:
        """The run is complete."""
        ...


class PlainGuard:
    """States in `folder` every few steps; the newest valid one is used."""

    def __init__(self, folder: Path, every_steps: int):
        self.folder, self.every_steps = folder, every_steps
        self._received: list[int] = []
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> "PlainGuard":
        if threading.current_thread() is threading.main_thread():
            self._earlier = {s: signal.signal(s, self._receive) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        """Ctrl-C and SIGTERM let the step end and its state be saved; a second Ctrl-C stops at once."""
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received.append(number)
        log.info("stopping after this step (once more: at once) ...")

    def restore(self, run: Run, most: int | None = None) -> bool:
        return saving.restore(run, self.folder, most)

    def beat(self, step: int, phase: str) -> None:
        """Nobody listens."""

    def judge(self, step: int, loss: float, norm: float) -> Verdict:
        if math.isfinite(loss) and math.isfinite(norm):
            return Verdict()
        return Verdict(action="stop", why=f"loss {loss}, gradient norm {norm}: training has diverged")

    def after_step(self, run: Run) -> None:
        stopping = run.placement.most(bool(self._received))  # a signal may have reached some processes only
        if run.position.step % self.every_steps == 0 or stopping:
            saving.save(run, self.folder)
        if stopping:
            raise KeyboardInterrupt

    def settle(self) -> Verdict:
        return Verdict()

    def finished(self) -> None:
        """Nothing to tell anybody."""


def guard_of(run: Run) -> Guard:
    """The guard for this process."""
    work, settings = run.out / WORK, run.config.resilience
    if not is_supervised():
        return PlainGuard(work, run.config.save_every_steps)
    from puna.train.resilience import inject
    from puna.train.resilience.guard import Guard as WatchedGuard
    from puna.train.resilience.peers import Peers

    save = replace(settings.save, every_steps=run.config.save_every_steps)
    layout = str(getattr(run.placement, "layout", ""))
    peers = Peers.of(run.placement)
    faults = inject.planned(run.out, run.placement.parts, run.placement.brought, run.loader)
    settings = replace(settings, save=save)
    place = {"peers": peers, "layout": layout, "brought": run.placement.brought}
    return WatchedGuard(settings, run.out, _capture, state.fill, **place, on_beat=faults)


def _capture(run: Run) -> tuple[dict[str, Tensor], dict[str, Any], Cut]:
    """This rank's pieces of the state."""
    tensors, record = state.capture(run)
    pieces, cut = run.placement.pieces(tensors)
    return pieces, record, cut


def stopped(step: int, verdict: Verdict) -> PunaError:
    """The error that ends a run which cannot go on."""
    hint = "lower schedule.peak; the run continues from its last saved state"
    return PunaError(f"step {step}: {verdict.why}", hint=hint)
