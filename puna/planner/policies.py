"""What to do about faults: when to save, skip, roll back, restart, give up, leave a node out.

Each policy is a frozen value with methods over plain numbers. It has no clock, no files and no tensors: time is an
argument, and what must be remembered is a small state that goes in and comes out. So the trainer's supervisor and the
simulator of a cluster run these very objects, and a policy that the simulator found good is the one that then runs.

    SavePolicy        which steps are saved in memory and on disk, and which copies are kept
    SpikePolicy       a loss that is not finite or jumps: once more, skip, roll back, lower the rate, stop
    DetectPolicy      heartbeats and progress: who hangs
    RestartPolicy     how often, and after which wait, a run is started again
    EvictionPolicy    which nodes are left out because of what happened on them
    StragglerPolicy   who is slower than the others, by how much

Sources: arXiv 2407.21783, 3.3.4 (what interrupts a run of 16K GPUs); Young, CACM 1974 (how often to save); arXiv
2410.21680 (nodes with a history); arXiv 2204.02311, 5.1 (roll back and pass over the data of a spike).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from puna.config import require

# --- when to save


@dataclass(frozen=True, kw_only=True)
class SavePolicy:
    """Which steps are saved: often into memory, seldom onto disk. A step is the number of steps that are done."""

    every_steps: int = 50  # durable: on disk
    memory_every_steps: int = 1  # in memory, this machine's and a neighbour's; 0: never
    kept: int = 2  # durable states: the newest, and older ones in case it is damaged

    def __post_init__(self) -> None:
        require(self.every_steps > 0, f"every_steps={self.every_steps} must be positive")
        require(self.memory_every_steps >= 0, f"memory_every_steps={self.memory_every_steps} must not be negative")
        require(self.kept > 0, f"kept={self.kept} must be positive", hint="2 survives one damaged state")

    def durable(self, step: int) -> bool:
        """Is the state after `step` steps saved on disk?"""
        return step % self.every_steps == 0

    def in_memory(self, step: int) -> bool:
        """Is the state after `step` steps saved in memory?"""
        return self.memory_every_steps > 0 and step % self.memory_every_steps == 0

    def superseded(self, saved: Sequence[int]) -> list[int]:
        """Of durable states in the order they were made, those that need not be kept."""
        return list(saved[: -self.kept])

    def lost_steps(self, step: int, *, memory_survives: bool) -> int:
        """Steps to be made again after a fault in the step that follows `step` done ones."""
        if memory_survives and self.memory_every_steps:
            return min(step % self.memory_every_steps, step % self.every_steps)
        return step % self.every_steps

    @staticmethod
    def best_interval_s(stall_s: float, between_faults_s: float) -> float:
        """Young's interval: sqrt(2 * stall * mean time between faults) seconds between saves lose the least."""
        return math.sqrt(2 * stall_s * between_faults_s)


# --- a loss that jumps


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


# --- who hangs


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A sign of life of one rank."""

    alive_s: float  # when its heart last beat: a thread of its own, which runs whatever the training does
    progress_s: float  # when it last came to another phase of a step
    progress: int = 0  # how many phases it has come through since the start
    waiting: bool = False  # whether it waits for other ranks


@dataclass(frozen=True, kw_only=True)
class Suspicion:
    """The ranks that are to blame, and why."""

    ranks: tuple[int, ...]
    kind: Literal["stopped", "stuck"]  # no heartbeat; a heartbeat, but no progress
    silent_s: float


@dataclass(frozen=True, kw_only=True)
class DetectPolicy:
    """Two clocks: the heart of a process that is stopped or gone is silent; one that is stuck makes no progress.

    In a step ranks wait for each other, so when one is stuck all are soon. To blame are those that do not wait for others;
    of them, those that are farthest behind.
    """

    beat_every_s: float = 0.2
    beat_timeout_s: float = 1.5
    step_budget_s: float = 60.0  # longest time without progress, once training
    start_budget_s: float = 300.0  # the same before the first step: reading weights, compiling

    def __post_init__(self) -> None:
        require(
            0 < self.beat_every_s * 2 <= self.beat_timeout_s,
            f"beat_timeout_s={self.beat_timeout_s} must be at least twice beat_every_s={self.beat_every_s}",
        )
        require(self.step_budget_s > 0, f"step_budget_s={self.step_budget_s} must be positive")

    def suspect(self, now_s: float, beats: Mapping[int, Beat], *, training: bool = True) -> Suspicion | None:
        """Who is to blame, or None while all is well. `training` says that the first step was made."""
        silent = {rank: now_s - beat.alive_s for rank, beat in beats.items()}
        stopped = tuple(rank for rank, seconds in silent.items() if seconds > self.beat_timeout_s)
        if stopped:
            return Suspicion(ranks=stopped, kind="stopped", silent_s=max(silent[r] for r in stopped))
        budget = self.step_budget_s if training else max(self.start_budget_s, self.step_budget_s)
        if not beats or now_s - max(beat.progress_s for beat in beats.values()) <= budget:
            return None
        busy = {rank: beat for rank, beat in beats.items() if not beat.waiting} or beats
        least = min(beat.progress for beat in busy.values())
        behind = tuple(rank for rank, beat in busy.items() if beat.progress == least)
        return Suspicion(ranks=behind, kind="stuck", silent_s=max(now_s - beats[r].progress_s for r in behind))


# --- whether to go on


@dataclass(frozen=True, kw_only=True)
class RestartState:
    """What `RestartPolicy` remembers."""

    times_s: tuple[float, ...] = ()  # of restarts within `per_s`
    step: int = -1  # the farthest that the run has come
    stuck: int = 0  # restarts since it last came farther


@dataclass(frozen=True, kw_only=True)
class Restart:
    """Start again after `wait_s` seconds, or, if not `go`, stop and say why."""

    go: bool
    wait_s: float = 0.0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """A run that gets ahead is restarted at once; one that does not waits longer each time, and then stops."""

    budget: int = 1000  # restarts within `per_s`
    per_s: float = 86_400.0
    without_progress: int = 5  # restarts at the same step
    first_wait_s: float = 1.0  # from the second restart at the same step on
    growth: float = 2.0
    longest_wait_s: float = 300.0

    def decide(self, state: RestartState, now_s: float, step: int) -> tuple[Restart, RestartState]:
        """What to do about a fault at time `now_s` in a run whose newest step is `step`."""
        times = (*(t for t in state.times_s if now_s - t < self.per_s), now_s)
        stuck = 0 if step > state.step else state.stuck + 1
        after = RestartState(times_s=times, step=max(step, state.step), stuck=stuck)
        if len(times) > self.budget:
            return Restart(go=False, why=f"{self.budget} restarts within {self.per_s:,.0f} s were not enough"), after
        if stuck > self.without_progress:
            why = f"{self.without_progress} restarts did not bring the run past step {after.step}"
            return Restart(go=False, why=why), after
        wait = min(self.first_wait_s * self.growth ** (stuck - 1), self.longest_wait_s) if stuck else 0.0
        return Restart(go=True, wait_s=wait), after


# --- whom to leave out

POINTS = {"corruption": 3.0, "hang": 1.0, "killed": 1.0, "crash": 1.0, "slow": 0.5, "maintenance": 0.0}


@dataclass(frozen=True, kw_only=True)
class EvictionPolicy:
    """A node whose faults within `window_s` weigh `points` or more is left out, the worst first, up to a share of all.

    A few nodes cause most of a cluster's failures. A wrong number is worse than no number: it weighs more.
    """

    points: float = 3.0
    window_s: float = 7 * 86_400.0
    most_share: float = 0.25  # of the nodes: more is not bad nodes but something else
    weights: dict[str, float] = field(default_factory=lambda: dict(POINTS))

    def weigh(self, history: Iterable[tuple[float, str]], now_s: float) -> float:
        """The weight of a node's faults, given as (time, kind)."""
        return sum(self.weights.get(kind, 1.0) for at_s, kind in history if now_s - at_s <= self.window_s)

    def left_out(self, histories: Mapping[str, Sequence[tuple[float, str]]], now_s: float, nodes: int) -> list[str]:
        """Those of `nodes` nodes that take no part, the worst first."""
        weight = {node: self.weigh(history, now_s) for node, history in histories.items()}
        bad = sorted((node for node in weight if weight[node] >= self.points), key=lambda node: (-weight[node], node))
        return bad[: int(self.most_share * nodes)]


# --- who is slow


@dataclass(frozen=True, kw_only=True)
class StragglerPolicy:
    """A rank's score is the median, over the last `window` steps, of its own time over the ranks' median of that step.

    Its own time is what it computed, without the time it waited for others. 1 is usual; a rank at `ratio` is slow. Of an
    even number the lower median is taken: of two ranks, the faster one is what is usual.
    """

    window: int = 32  # steps
    least: int = 8  # steps before anybody can be slow
    ratio: float = 1.3

    def scores(self, own_s: Mapping[int, Sequence[float]]) -> dict[int, float]:
        """Rank -> score, from each rank's own seconds of the same steps, newest last."""
        steps = min((len(times) for times in own_s.values()), default=0)
        steps = min(steps, self.window)
        if steps < self.least:
            return {}
        recent = {rank: list(times)[-steps:] for rank, times in own_s.items()}
        usual = [statistics.median_low(times[i] for times in recent.values()) for i in range(steps)]
        return {
            rank: statistics.median(mine / middle if middle > 0 else 1.0 for mine, middle in zip(times, usual))
            for rank, times in recent.items()
        }

    def slow(self, own_s: Mapping[int, Sequence[float]]) -> list[int]:
        """The ranks that are slow, the slowest first."""
        scores = self.scores(own_s)
        return sorted((rank for rank in scores if scores[rank] >= self.ratio), key=lambda rank: -scores[rank])
