"""What stands between a run and its faults, as the loop sees it.

The loop says where it is (`beat`), asks whether a step's numbers are sound (`judge`), and tells when a step is done
(`after_step`); it never knows how states are kept, who watches, or what a fault costs. `PlainGuard` is the guard of a
process without a supervisor: states on disk, Ctrl-C and SIGTERM save first, a number that is not finite stops the run.
"""

import math
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from puna import log
from puna.errors import PunaError
from puna.train import saving
from puna.train.state import Run


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done with a step whose gradients are there and whose update is not made yet."""

    action: Literal["go", "again", "skip", "roll_back", "lower_rate", "stop"] = "go"
    to: int = 0  # steps, of the state to go back to at most; for roll_back and lower_rate
    rate: float = 1.0  # factor of the learning rate, of all lowerings so far
    why: str = ""


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

    def finished(self) -> None:
        """Nothing to tell anybody."""


def stopped(step: int, verdict: Verdict) -> PunaError:
    """The error that ends a run which cannot go on."""
    hint = "lower schedule.peak; the run continues from its last saved state"
    return PunaError(f"step {step}: {verdict.why}", hint=hint)
