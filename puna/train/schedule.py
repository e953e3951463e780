"""How the learning rate goes over a run: warm-up, cosine, then an anneal to zero (arXiv 2407.21783, 3.4).

step < warmup            linear from 0 to peak
until the anneal begins  cosine from peak down to `floor` * peak
anneal                   linear from there to 0; in its last part the weights of several moments are averaged (Polyak)
"""

import math
from dataclasses import dataclass

from puna.config import require


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate as a function of the step."""

    peak: float = 1e-3
    warmup_steps: int = 20
    floor: float = 0.1  # the cosine's end, as a share of the peak
    anneal_share: float = 0.2  # the last share of the steps, spent going to zero
    averaged: int = 0  # moments of the anneal whose weights are averaged into the result; 0: the last weights
    averaged_share: float = 0.25  # of the anneal, its end, over which they are spread

    def __post_init__(self) -> None:
        require(self.peak > 0, f"peak={self.peak} must be positive")
        require(0 <= self.anneal_share <= 1, f"anneal_share={self.anneal_share} must lie in 0..1")
        require(self.averaged >= 0, f"averaged={self.averaged} must not be negative")
        require(0 < self.averaged_share <= 1, f"averaged_share={self.averaged_share} must lie in 0..1 and not be 0")

    def anneal_start(self, steps: int) -> int:
        """The first step of the anneal in a run of `steps`."""
        return steps - round(steps * self.anneal_share)

    def learning_rate(self, step: int, steps: int) -> float:
        """The rate of step `step` (from 0) in a run of `steps`."""
        start = self.anneal_start(steps)
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if step < start:
            return self._cosine((step - self.warmup_steps) / max(1, start - self.warmup_steps))
        height = self._cosine(1.0) if start > self.warmup_steps else self.peak
        return height * (steps - step) / max(1, steps - start + 1)

    def is_averaged(self, step: int, steps: int) -> bool:
        """Whether the weights after step `step` enter the average: `averaged` moments, even over the anneal's end."""
        if not self.averaged:
            return False
        start = steps - max(1, round((steps - self.anneal_start(steps)) * self.averaged_share))
        every = max(1, (steps - start) // self.averaged)
        return step >= start and (steps - 1 - step) % every == 0 and (steps - 1 - step) // every < self.averaged

    def _cosine(self, progress: float) -> float:
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress)))
