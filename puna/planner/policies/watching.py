"""Who hangs, by heartbeats and progress, and who is slower than the others."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from puna.config import require


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
