"""How the learning rate goes over a run: warm-up, cosine, then an anneal to zero (arXiv 2407.21783, 3.4).

    tokens < warm-up         linear from 0 to peak
    until the anneal begins  cosine from peak down to `floor` * peak
    anneal                   linear from there to 0; in its last part the weights of several moments are averaged (Polyak)

Everything is a function of the tokens scheduled so far, never of the step: the batch may grow on the way.
"""

import math
from dataclasses import dataclass

from puna.config import require


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a function of the tokens. `Course` knows the run's length and makes the numbers."""

    peak: float = 1e-3
    warmup_steps: int = 20  # of the first phase's batch
    warmup_tokens: int = 0  # instead, if not 0
    floor: float = 0.1  # the cosine's end, as a share of the peak
    anneal_share: float = 0.2  # the last share of the tokens, spent going to zero, if no phase says where
    averaged: int = 0  # moments of the anneal whose weights are averaged into the result; 0: the last weights
    averaged_share: float = 0.25  # of the anneal, its end, over which they are spread

    def __post_init__(self) -> None:
        require(self.peak > 0, f"peak={self.peak} must be positive")
        require(self.warmup_tokens >= 0, f"warmup_tokens={self.warmup_tokens} must not be negative")
        require(0 <= self.anneal_share <= 1, f"anneal_share={self.anneal_share} must lie in 0..1")
        require(self.averaged >= 0, f"averaged={self.averaged} must not be negative")
        require(0 < self.averaged_share <= 1, f"averaged_share={self.averaged_share} must lie in 0..1 and not be 0")


@dataclass(frozen=True, kw_only=True)
class Course:
    """A schedule over a run of `total` tokens. A step goes from `done` tokens to `done + size`."""

    schedule: Schedule
    total: int
    warmup: int  # tokens
    anneal: int  # where the anneal begins, in tokens

    @classmethod
    def of(cls, schedule: Schedule, total: int, first_batch: int, anneal: int | None = None) -> "Course":
        """The course of a run of `total` tokens whose first steps take `first_batch` each."""
        return cls(
            schedule=schedule,
            total=total,
            warmup=schedule.warmup_tokens or schedule.warmup_steps * first_batch,
            anneal=total - round(total * schedule.anneal_share) if anneal is None else anneal,
        )

    def learning_rate(self, done: int, size: int) -> float:
        """The rate of a step."""
        peak = self.schedule.peak
        if done < self.warmup:
            return peak * min(1.0, (done + size) / self.warmup)
        if done < self.anneal:
            return self._cosine((done - self.warmup) / max(1, self.anneal - self.warmup))
        height = self._cosine(1.0) if self.anneal > self.warmup else peak
        return height * max(self.total - done, 0) / max(1, self.total - self.anneal + size)

    def is_averaged(self, done: int, size: int) -> bool:
        """Whether the weights after a step enter the average: `averaged` moments, even over the anneal's end."""
        count = self.schedule.averaged
        if not count or done >= self.total:
            return False
        span = max(size, round((self.total - self.anneal) * self.schedule.averaged_share / size) * size)
        every = max(1, span // size // count) * size
        left = self.total - (done + size)
        moment = -(-left // every)  # moments are at 0, 1, 2, ... times `every` tokens before the end
        return done >= self.total - span and moment < count and moment * every < left + size

    def _cosine(self, progress: float) -> float:
        floor = self.schedule.floor
        return self.schedule.peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
