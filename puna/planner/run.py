"""What a simulated run leaves behind."""

from dataclasses import dataclass, field

from puna.planner import account as to
from puna.planner.account import Account

PLANNED = "planned maintenance"
STRAGGLER = "slow node"
SPIKE = "jump of the loss"
STARTING = "restart that failed"
STAYED = "corruption that stayed"
HELP = "person needed"


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that stopped the run, for a timeline."""

    at_s: float
    cause: str
    lost_steps: int
    down_s: float  # until steps were made again


@dataclass(frozen=True, kw_only=True)
class Run:
    """What became of one simulated run."""

    seed: int
    seconds: float
    steps: int  # that are part of the result
    step_s: float  # of one step at the usual speed
    account: Account = field(repr=False)
    events: tuple[Event, ...] = field(repr=False)
    progress: tuple[tuple[float, int], ...] = field(repr=False)  # (second, steps done), at each event
    counts: dict[str, int]  # what happened how often: unexpected and planned interruptions by cause, and more

    @property
    def effective(self) -> float:
        """Effective training time: the share of all time that went into steps that count (arXiv 2407.21783, 3.3.4)."""
        return sum(self.account.of_kind(kind) for kind in to.COUNTS) / self.seconds

    @property
    def of_undisturbed(self) -> float:
        """Steps made, as a share of those of a run to which nothing happens and that never saves."""
        return self.steps * self.step_s / self.seconds
