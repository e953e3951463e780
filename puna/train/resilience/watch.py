"""Who hangs, and where: the board read against `DetectPolicy`, and a look at the process that is to blame.

A watcher can itself be held up: a machine that sleeps, a debugger, a batch system that stops everything for a while. It
knows that from its own clock, and then gives everybody the time to show that they live.
"""

import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

from puna.planner.policies import Beat, DetectPolicy, Suspicion
from puna.train.resilience.board import Board

STACK_SIGNAL = signal.SIGUSR1  # a rank answers it with the stacks of its threads


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A rank that hangs: since when, where, and what it was doing."""

    rank: int
    kind: str  # stopped | stuck
    silent_s: float
    step: int
    phase: str
    where: str  # the innermost line of the stack, or what the kernel says of the process
    stack: str

    def __str__(self) -> str:
        what = "has no heartbeat" if self.kind == "stopped" else "makes no progress"
        return f"rank {self.rank} {what} for {self.silent_s:.1f} s, in {self.phase} of step {self.step}: {self.where}"


class Watch:
    """Looks at a board now and then. `tick` gives the ranks that hang."""

    def __init__(self, board: Board, policy: DetectPolicy, stacks: Path):
        self.board, self.policy, self.stacks = board, policy, stacks
        self.last = time.monotonic()
        self.since = self.last  # nobody is expected to have beaten before this

    def restart(self) -> None:
        """Ranks are being started: their time begins now."""
        self.last = self.since = time.monotonic()

    def tick(self, alive: dict[int, int]) -> list[Finding]:
        """Who of `alive` (rank -> pid) hangs. Call several times a second."""
        now = time.monotonic()
        if now - self.last > self.policy.beat_timeout_s / 2:  # we were held up, and so perhaps were they
            self.since = now
        self.last = now
        lines = {rank: self.board.read(rank) for rank in alive}
        begun = {rank: line.pid == alive[rank] for rank, line in lines.items()}
        waiting = Beat(alive_s=now, progress_s=self.since)
        beats = {rank: self._forgiven(line.beat) if begun[rank] else waiting for rank, line in lines.items()}
        training = all(begun.values()) and all(line.step >= 0 for line in lines.values())
        suspicion = self.policy.suspect(now, beats, training=training)
        if suspicion is None:
            return []
        return [self._find(rank, alive[rank], suspicion) for rank in suspicion.ranks]

    def _forgiven(self, beat: Beat) -> Beat:
        return replace(beat, alive_s=max(beat.alive_s, self.since), progress_s=max(beat.progress_s, self.since))

    def _find(self, rank: int, pid: int, suspicion: Suspicion) -> Finding:
        line = self.board.read(rank)
        state = process_state(pid)
        stack = "" if state.startswith(("T", "t", "Z")) else self._stack(rank, pid)
        return Finding(
            rank=rank,
            kind=suspicion.kind,
            silent_s=suspicion.silent_s,
            step=line.step,
            phase=line.phase,
            where=innermost(stack) or f"the process is in state {state}",
            stack=stack,
        )

    def _stack(self, rank: int, pid: int) -> str:
        """Ask a process for its stacks, which it writes even where the GIL is held."""
        path = self.stacks / f"stack-{rank}.txt"
        before = path.stat().st_size if path.exists() else 0
        try:
            os.kill(pid, STACK_SIGNAL)
        except ProcessLookupError:
            return ""
        deadline, text = time.monotonic() + 0.3, ""
        while time.monotonic() < deadline:
            time.sleep(0.02)
            written = path.read_text(errors="replace")[before:] if path.exists() else ""
            if written and written == text:
                break
            text = written
        return text


def process_state(pid: int) -> str:
    """The kernel's word for what a process does: `T (stopped)`, `S (sleeping)`; Linux only, else empty."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("State:")), "")


def innermost(stack: str) -> str:
    """Of faulthandler's text, the innermost line of the main thread, which it writes last."""
    threads = [part for part in stack.split("\n\n") if part.strip()]
    lines = threads[-1].splitlines() if threads else []
    return next((line.strip() for line in lines if line.startswith("  File")), "")
