"""A loss that is not finite or jumps: once more, skip, roll back, lower the rate, stop."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from puna.config import require


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is to be done with a step whose gradients are there and whose update is not made yet.

    go          update
    again       compute the same step once more: a fault of the machine does not come twice, one of the data does
    skip        no update; the data is passed over
    roll_back   back to a state of at most `to` steps; the data between there and here is passed over
    lower_rate  the same, and from now on the learning rate is multiplied by `rate`
    stop        nothing helped: end the run with a report
    """

    action: Literal["go", "again", "skip", "roll_back", "lower_rate", "stop"] = "go"
    to: int = 0  # steps; for roll_back and lower_rate
    pass_over: bool = True  # the data since then is at fault and not read again; False: a machine was
    rate: float = 1.0  # of all lowerings so far
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class SpikeState:
    """What `SpikePolicy` remembers. It is saved with the run: a restarted run judges as the first one did."""

    losses: tuple[float, ...] = ()  # of accepted steps, newest last
    norms: tuple[float, ...] = ()
    bad_steps: tuple[int, ...] = ()  # since the last roll-back or calm
    last_bad: int = -1  # the newest bad step that is not forgiven, also after a roll-back
    roll_backs: int = 0
    lowerings: int = 0
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SpikePolicy:
    """From a single bad batch to a run that cannot go on, without a person.

    A step is bad if its loss or gradient norm is not finite, or exceeds the median of the last `window` accepted steps
    by more than `sigmas` robust standard deviations (1.4826 times the median absolute deviation, but at least `floor`
    of the median). A median is not moved by the outliers it is to find; a mean and a standard deviation are.
    """

    window: int = 128  # accepted steps
    least: int = 16  # accepted steps before a finite value can be bad
    sigmas: float = 6.0
    floor: float = 0.05  # share of the median
    repeat: bool = True  # compute a bad step once more before anything else
    skips: int = 3  # bad steps within `calm_steps` that are just skipped
    back_steps: int = 20  # a roll-back goes to at least this many steps before the first bad one
    roll_backs: int = 2
    lowerings: int = 2
    factor: float = 0.5  # of the learning rate, per lowering
    calm_steps: int = 500  # without a bad step, after which all is forgiven (but the rate stays lowered)

    def __post_init__(self) -> None:
        require(self.window >= self.least > 1, f"least={self.least} must be 2 to window={self.window}")
        require(self.sigmas > 0 and self.floor >= 0, f"sigmas={self.sigmas}, floor={self.floor} must be positive")
        require(0 < self.factor <= 1, f"factor={self.factor} must be above 0 and at most 1")

    def judge(
        self, state: SpikeState, step: int, loss: float, norm: float, *, repeated: bool = False
    ) -> tuple[Verdict, SpikeState]:
        """The verdict on step `step` (0 is the first), and what to remember.

        `repeated` says that this is the step's second computation, after the verdict `again`.
        """
        why = self.fault(state, loss, norm)
        if not why:
            return Verdict(rate=state.rate), self._accepted(state, step, loss, norm)
        if self.repeat and not repeated:
            return Verdict(action="again", rate=state.rate, why=why), state
        return self._escalate(state, step, why)

    def fault(self, state: SpikeState, loss: float, norm: float) -> str:
        """What is wrong with these values, in words; empty if nothing is."""
        for name, value, earlier in (("loss", loss, state.losses), ("gradient norm", norm, state.norms)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
            if len(earlier) >= self.least and value > (most := self._most(earlier)):
                return f"the {name} is {value:.4g}, {statistics.median(earlier):.4g} was usual, {most:.4g} the most"
        return ""

    def forget(self, state: SpikeState) -> SpikeState:
        """For a planned change of data or sequence length: what was usual before says nothing about what comes."""
        return replace(state, losses=(), norms=())

    def _most(self, earlier: Sequence[float]) -> float:
        middle = statistics.median(earlier)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in earlier)
        return middle + self.sigmas * max(spread, self.floor * abs(middle))

    def _accepted(self, state: SpikeState, step: int, loss: float, norm: float) -> SpikeState:
        state = replace(
            state,
            losses=(*state.losses, loss)[-self.window :],
            norms=(*state.norms, norm)[-self.window :],
        )
        if state.last_bad >= 0 and step - state.last_bad > self.calm_steps:
            state = replace(state, bad_steps=(), last_bad=-1, roll_backs=0, lowerings=0)
        return state

    def _escalate(self, state: SpikeState, step: int, why: str) -> tuple[Verdict, SpikeState]:
        state = replace(state, last_bad=step)
        bad = (*(s for s in state.bad_steps if s < step), step)
        recent = [s for s in bad if step - s <= self.calm_steps]
        if len(recent) <= self.skips:
            return Verdict(action="skip", rate=state.rate, why=why), replace(state, bad_steps=bad)
        to = max(0, recent[0] - self.back_steps)
        if state.roll_backs < self.roll_backs:
            after = replace(state, bad_steps=(), roll_backs=state.roll_backs + 1)
            return Verdict(action="roll_back", to=to, rate=state.rate, why=why), after
        if state.lowerings < self.lowerings:
            rate = state.rate * self.factor
            after = replace(state, bad_steps=(), roll_backs=0, lowerings=state.lowerings + 1, rate=rate)
            return Verdict(action="lower_rate", to=to, rate=rate, why=why), after
        return Verdict(action="stop", rate=state.rate, why=why), replace(state, bad_steps=bad)
