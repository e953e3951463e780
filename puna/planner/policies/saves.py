"""When to save: often into memory, seldom onto disk."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from puna.config import require


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
