"""What interrupts a training run, and how often: published counts, as rates per GPU and hour.

`LLAMA3` is table 5 of the Llama 3 paper (arXiv 2407.21783): 419 unexpected interruptions in 54 days on 16,384 GPUs. Its
counts are used, not its percentages, which do not agree with them (148 of 419 is 35.3%; printed is 30.1%).

    rate of a cause = count / (GPUs x hours observed), the same for each GPU; 419 make 1.97e-5 per GPU-hour,
    an interruption every 3.09 hours of 16,384 GPUs

The table says what happened and how often. How a cause shows, whether a node is to blame and how long its repair takes is
not published: those columns are our reading of the causes' names, and `puna simulate` says how much they matter.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from puna import config
from puna.config import require
from puna.errors import DataError

Shows = Literal["exit", "hang", "silent"]
KIND = {"exit": "crash", "hang": "hang", "silent": "corruption"}  # as `EvictionPolicy` weighs them


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One row of a table of interruptions."""

    name: str
    count: float  # interruptions observed
    shows: Shows = (
        "exit"  # a process is gone; all wait for one that does not answer; or nothing is seen, and numbers are wrong
    )
    node: bool = True  # is one node to blame?
    broken: float = 0.0  # share of these faults that come back at once on the same node, until it is repaired
    repair_h: float = 24.0  # until the node is back, once it was taken out

    def __post_init__(self) -> None:
        require(self.count >= 0, f"{self.name}: count={self.count} must not be negative")
        require(0 <= self.broken <= 1, f"{self.name}: broken={self.broken} is not a share")
        require(self.repair_h >= 0, f"{self.name}: repair_h={self.repair_h} must not be negative")


@dataclass(frozen=True, kw_only=True)
class FailureTable:
    """Interruptions that were counted on `gpus` GPUs during `hours`."""

    source: str = ""
    gpus: int
    hours: float
    causes: tuple[Cause, ...]

    def __post_init__(self) -> None:
        require(self.gpus > 0 and self.hours > 0, "gpus and hours observed must be positive")
        names = [cause.name for cause in self.causes]
        require(len(set(names)) == len(names), "each cause must have a name of its own")

    @property
    def count(self) -> float:
        """Interruptions of all causes."""
        return sum(cause.count for cause in self.causes)

    @property
    def per_gpu_hour(self) -> float:
        """Interruptions per GPU and hour."""
        return self.count / (self.gpus * self.hours)

    def between_s(self, gpus: int) -> float:
        """Mean seconds between two interruptions of a job on `gpus` GPUs; infinite if none was counted."""
        return 3600 / (self.per_gpu_hour * gpus) if self.count else float("inf")


def read_table(path: Path) -> FailureTable:
    """A table from JSON: `{"gpus": 64, "hours": 720, "causes": [{"name": "faulty GPU", "count": 3}]}`.

    Raises `DataError` for what is not such a file, `ConfigError` for a wrong field.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        hint = 'a table looks like {"gpus": 64, "hours": 720, "causes": [{"name": "faulty GPU", "count": 3}]}'
        raise DataError(f"{path} is not a table of failures: {error}", hint=hint) from None
    return config.from_json(FailureTable, found)


def _row(name: str, count: int, shows: Shows = "exit", *, node: bool = True, broken: float = 0, repair_h: float = 24):
    return Cause(name=name, count=count, shows=shows, node=node, broken=broken, repair_h=repair_h)


LLAMA3 = FailureTable(
    source="arXiv 2407.21783, table 5",
    gpus=16_384,
    hours=54 * 24,
    causes=(
        _row("faulty GPU", 148, broken=0.5, repair_h=48),
        _row("GPU HBM3 memory", 72, broken=0.3, repair_h=48),
        _row("software bug", 54, node=False),
        _row("network switch or cable", 35, "hang", broken=0.5, repair_h=12),
        _row("unplanned host maintenance", 32, broken=1.0, repair_h=6),
        _row("GPU SRAM memory", 19, broken=0.3, repair_h=48),
        _row("GPU system processor", 17, "hang", broken=0.2),
        _row("network card", 7, "hang", broken=0.5),
        _row("NCCL watchdog timeout", 7, "hang", node=False),
        _row("silent data corruption", 6, "silent", repair_h=48),
        _row("GPU thermal interface or sensor", 6, broken=0.5, repair_h=48),
        _row("SSD", 3, broken=1.0),
        _row("power supply", 3, broken=1.0),
        _row("server chassis", 2, broken=1.0, repair_h=48),
        _row("IO expansion board", 2, broken=1.0, repair_h=48),
        _row("dependency", 2, node=False),
        _row("CPU", 2, broken=1.0, repair_h=48),
        _row("system memory", 2, broken=1.0, repair_h=48),
    ),
)
LLAMA3_PLANNED = 47  # interruptions in the same 54 days: firmware, and changes by operators
