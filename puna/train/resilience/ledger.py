"""The goodput ledger: where every second of a run went, and what each fault cost.

`ledger.jsonl` in the run's folder has a line per event, from the supervisor and from rank 0, and is never cut. Between
one event and the next lies an interval; the later event says what it was spent on. So the categories add up to the
time on the wall by construction:

    training      steps whose updates are in the final weights
    saving        what the training waited for checkpoints        checking    ... for comparing replicas
    repeated      steps that had to be made again after a fault   bad data    skipped, recomputed, rolled-back steps
    detecting     from a rank's last sign of life to the alarm    restarting  from the alarm to training again
    starting      from the command to the first step              evaluating  held-out and downstream
    down          the run was not running

Goodput is the share of training in all that; what a supervisor could not help (down) is shown, and left out.
"""

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LEDGER = "ledger.jsonl"
CATEGORIES = [
    "training", "saving", "checking", "evaluating", "bad data", "repeated", "detecting", "restarting", "starting", "down",
]  # fmt: skip


class Ledger:
    """Writes events; lines are appended whole, so several processes may write.

    A disk that is full stops nobody: lines wait in this process until there is room, and are lost only if it dies.
    """

    def __init__(self, folder: Path):
        self.path = folder / LEDGER
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()

    def write(self, event: str, **values: Any) -> None:
        """Note that `event` ended now."""
        line = json.dumps({"at": round(values.pop("at", None) or time.time(), 4), "event": event, **values})
        with self._lock:  # the threads that save write, too
            self._waiting.append(line.encode() + b"\n")
            with contextlib.suppress(OSError):
                self._write_what_waits()

    def _write_what_waits(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            if os.write(self.descriptor, line) < len(line):  # cut short: whole once more, on a line of its own
                self._waiting[0] = b"\n" + line.lstrip(b"\n")
                return
            del self._waiting[0]

    def close(self) -> None:
        """Write no more."""
        os.close(self.descriptor)


def read(folder: Path) -> list[dict[str, Any]]:
    """The events of a run in the order of their time; a line that a kill cut short is left out."""
    events = []
    for line in (folder / LEDGER).read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("at"), (int, float)) and "event" in event:
            events.append(event)
    return sorted(events, key=lambda event: event["at"])


@dataclass(kw_only=True)
class Interval:
    """A stretch of a run's time."""

    start: float  # seconds since the epoch
    end: float
    category: str
    step: int | None = None  # the step that was made in it

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(kw_only=True)
class FaultCost:
    """One fault: what it was, and the seconds that it cost."""

    at: float
    kind: str
    rank: int | None
    why: str
    detecting_s: float = 0.0
    restarting_s: float = 0.0
    lost_steps: int = 0
    repeated_s: float = 0.0

    @property
    def cost_s(self) -> float:
        return self.detecting_s + self.restarting_s + self.repeated_s


@dataclass(kw_only=True)
class Account:
    """A run's time, divided."""

    intervals: list[Interval] = field(default_factory=list)
    faults: list[FaultCost] = field(default_factory=list)

    def seconds(self) -> dict[str, float]:
        """Category -> seconds; they add up to the time from the first event to the last."""
        total: Counter[str] = Counter(dict.fromkeys(CATEGORIES, 0.0))
        for interval in self.intervals:
            total[interval.category] += interval.seconds
        return dict(total)

    @property
    def goodput(self) -> float:
        """The share of training in the time that the run ran."""
        seconds = self.seconds()
        ran = sum(seconds.values()) - seconds["down"]
        return seconds["training"] / ran if ran > 0 else 0.0


def account(events: Iterable[dict[str, Any]]) -> Account:
    """Divide a run's time. `events` as `read` gives them."""
    book = _Book()
    for event in events:
        book.enter(event)
    return book.account


class _Book:
    """Goes through the events once. `cursor` is the end of what is divided already."""

    def __init__(self) -> None:
        self.account = Account()
        self.cursor: float | None = None
        self.stopped = False
        self.fault: FaultCost | None = None  # the last one, until training goes on
        self.begun = False

    def enter(self, event: dict[str, Any]) -> None:
        at = event["at"]
        if self.cursor is None:
            self.cursor = at
        handler = getattr(self, f"_{event['event']}", None)
        if handler is not None:
            handler(event, at)

    def _spend(self, until: float, category: str, step: int | None = None) -> float:
        """All time up to `until` goes to `category`; the seconds."""
        seconds = max(0.0, until - self.cursor)
        if seconds:
            self.account.intervals.append(
                Interval(start=self.cursor, end=self.cursor + seconds, category=category, step=step)
            )
            self.cursor += seconds
        return seconds

    def _begin(self, event: dict[str, Any], at: float) -> None:
        """A command was given, or a supervisor took over from one that died."""
        adopted = event.get("adopted", False)
        if not adopted:
            self._spend(at, "down" if self.begun else "starting")
        self.begun = True

    def _attempt(self, event: dict[str, Any], at: float) -> None:
        self._restarting(at)

    def _restored(self, event: dict[str, Any], at: float) -> None:
        """Training stands at `step` again: what was done beyond it is done for nothing."""
        self._restarting(at)
        lost = [i for i in self.account.intervals if i.category == "training" and i.step > event["step"]]
        for interval in lost:
            interval.category = "repeated"
        if self.fault is not None:
            self.fault.lost_steps += len({i.step for i in lost})
            self.fault.repeated_s += sum(i.seconds for i in lost)

    def _restarting(self, at: float) -> None:
        seconds = self._spend(at, "starting" if self.fault is None else "restarting")
        if self.fault is not None:
            self.fault.restarting_s += seconds

    def _step(self, event: dict[str, Any], at: float) -> None:
        """A step is done; of its time, `saving` and `checking` seconds were waited."""
        whole = max(0.0, at - self.cursor)
        saving, checking = (min(event.get(name, 0.0), whole / 2) for name in ("saving", "checking"))
        self._spend(self.cursor + saving, "saving")
        self._spend(self.cursor + checking, "checking")
        self._spend(at, "training" if event.get("made", True) else "bad data", event["step"])
        self.fault = None

    def _evaluated(self, event: dict[str, Any], at: float) -> None:
        self._spend(at, "evaluating")

    def _rolled_back(self, event: dict[str, Any], at: float) -> None:
        """The policy for bad data, or wrong numbers on a rank, took the run back to `step`."""
        self._spend(at, "bad data" if event["why"] == "data" else "restarting")
        lost = [i for i in self.account.intervals if i.category == "training" and i.step > event["step"]]
        for interval in lost:
            interval.category = "bad data" if event["why"] == "data" else "repeated"
        if event["why"] != "data" and self.fault is not None:
            self.fault.lost_steps += len({i.step for i in lost})
            self.fault.repeated_s += sum(i.seconds for i in lost)

    def _fault(self, event: dict[str, Any], at: float) -> None:
        """An alarm; `since` is the last sign of progress."""
        begun = min(max(event.get("since", at), self.cursor), at)
        unfinished = self._spend(begun, "repeated")  # the step that the fault broke off
        detecting = self._spend(at, "detecting")
        self.fault = FaultCost(
            at=at, kind=event["kind"], rank=event.get("rank"), why=event.get("why", ""), detecting_s=detecting
        )
        self.fault.repeated_s += unfinished
        self.account.faults.append(self.fault)

    def _end(self, event: dict[str, Any], at: float) -> None:
        """The run was brought to a safe end: complete, or because somebody wanted it."""
        self._spend(at, "saving" if self.account.intervals else "starting")


def table(account: Account) -> str:
    """The account as text: categories, then faults by kind."""
    seconds = account.seconds()
    whole = sum(seconds.values()) or 1.0
    lines = [f"goodput {account.goodput:.1%} of {whole - seconds['down']:,.1f} s", ""]
    lines += [f"  {name:<11}{seconds[name]:>10,.1f} s {seconds[name] / whole:>7.1%}" for name in CATEGORIES]
    if account.faults:
        lines += ["", f"  {'fault':<12}{'times':>6}{'detected':>10}{'restarted':>11}{'steps lost':>12}{'cost':>9}"]
    for kind in sorted({fault.kind for fault in account.faults}):
        of = [fault for fault in account.faults if fault.kind == kind]
        detected, restarted, cost = (
            sum(getattr(f, name) for f in of) / len(of) for name in ("detecting_s", "restarting_s", "cost_s")
        )
        lost = sum(f.lost_steps for f in of) / len(of)
        lines.append(f"  {kind:<12}{len(of):>6}{detected:>8.2f} s{restarted:>9.2f} s{lost:>12.1f}{cost:>7.2f} s")
    return "\n".join(lines)
