"""The supervisor: starts the ranks of a run on this machine, watches them, and starts them again.

    attempt     ranks are forked by the zygote, which has everything imported
    watching    a rank that exits is known at once, from the zygote; one that hangs, from the board (watch.py)
    fault       say which rank and where, kill what is left, ask the policies whether and when to go on, next attempt
    asked to    end (SIGTERM), or drain a node: ranks save in the middle of their step and leave

It holds nothing that a run needs. Killed, it is started again by the launcher, finds zygote and ranks where they were,
and goes on watching; the training notices nothing.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from puna import config, log
from puna.artifacts import WORK, write_atomic
from puna.planner.policies import RestartState
from puna.train.resilience import blame, nodes, signals
from puna.train.resilience.blame import Fault
from puna.train.resilience.board import Board
from puna.train.resilience.job import Job
from puna.train.resilience.ledger import Ledger
from puna.train.resilience.line import Line
from puna.train.resilience.watch import Finding, Watch

TICK_S = 0.05
DRAIN = "drain"  # a folder in the run's scratch: a file in it names a node that is wanted for maintenance
BACKGROUND = "PUNA_LOGS"


class Supervisor:
    """One run on one machine. `run` returns the exit status for the launcher."""

    def __init__(self, job: Job, out: Path, root: Path, *, takes_over: bool = False):
        self.job, self.out, self.root, self.takes_over = job, out, root, takes_over
        self.ledger = Ledger(out)
        self.attempt, self.restarts = -1, RestartState()
        self.ranks: dict[int, int] = {}  # rank -> pid
        self.done: set[int] = set()
        self.places: list[str] = []
        self.asked = False
        self.drained: set[str] = set()
        self.line = Line(root)
        self._recall()

    # --- the run

    def run(self) -> int:
        """Until the run is finished, was asked to end, or cannot go on."""
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.ledger.write("begin", adopted=self.takes_over, pid=os.getpid())
        self.line.connect()
        if not self._adopt():
            self._start()
        while True:
            fault = self._watch()
            if fault is None:
                return self._end("finished" if len(self.done) == self.job.processes else "asked to")
            status = self._answer(fault)
            if status is not None:
                return status

    def _answer(self, fault: Fault) -> int | None:
        """Kill what is left, and start again; or the exit status if that would not help."""
        step = max((self._board(rank).step for rank in range(self.job.processes)), default=-1)
        self._report(fault, step)
        self._kill_all()
        if fault.kind == "user":
            print(f"error: {fault.why}", file=sys.stderr)
            self._end("error")
            return signals.USER_ERROR
        restart, self.restarts = self.job.settings.restart.decide(self.restarts, time.time(), step)
        if not restart.go:
            print(f"error: the run was stopped: {restart.why}\nhint: {self._hint(fault)}", file=sys.stderr)
            self._end("gave up")
            return 1
        if not self._wait(restart.wait_s):
            return self._end("asked to")
        if fault.kind == "zygote":
            self.line.connect()
        self._start()
        return None

    def _wait(self, seconds: float) -> bool:
        """Let time pass before a start; False if the run was asked to end meanwhile."""
        if seconds >= 1:
            log.info(f"waiting {seconds:.0f} s before the next start")
        deadline = time.monotonic() + seconds
        while not self.asked and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, TICK_S))
        return not self.asked

    def _hint(self, fault: Fault) -> str:
        return f"the last fault was: {fault.first_line or fault.kind}; logs in {self._logs()}"

    def _report(self, fault: Fault, step: int) -> None:
        since = time.time() - (time.monotonic() - fault.since_s if fault.since_s else 0.0)
        node = self.places[fault.rank] if fault.rank is not None and self.places else None
        if fault.kind != "user":  # whose mistake is told once, at the end
            whose = f", rank {fault.rank}" if fault.rank is not None else ""
            log.warn(f"step {step}: {fault.kind}{whose}: {fault.first_line}")
        if fault.stack:
            with contextlib.suppress(OSError):  # the disk may be full
                (self._logs() / f"stack-attempt-{self.attempt}-rank-{fault.rank}.txt").write_text(fault.stack)
        values = {"rank": fault.rank, "node": node, "step": step, "attempt": self.attempt, "why": fault.why[:2000]}
        self.ledger.write("fault", kind=fault.kind, since=since, **values)
        if node is not None and fault.kind != "user":
            nodes.note(self.out, node, {"abort": "crash"}.get(fault.kind, fault.kind))

    def _end(self, why: str) -> int:
        self.ledger.write("end", why=why)
        return 0 if why == "finished" else signals.LEFT

    # --- starting

    def _start(self) -> None:
        job = self.job
        places = list(job.nodes) or [os.environ.get("PUNA_NODE") or socket.gethostname()]
        needed = -(-job.processes // job.each)
        usable = [node for node in places if node not in self.drained]
        chosen, out = nodes.chosen(self.out, usable, needed, job.settings.eviction)
        if out:
            log.warn(f"left out because of what happened there: {', '.join(out)}")
        self.attempt += 1
        self.places = [chosen[min(rank // job.each, len(chosen) - 1)] for rank in range(job.processes)]
        self.done.clear()
        for node in set(self.places):
            (self.root / node).mkdir(exist_ok=True)
            Board(self.root / node / "board", job.processes).clear()
            shutil.rmtree(self.root / node / "errors", ignore_errors=True)
        self._remember()  # before anybody sees this number: another supervisor must not use it again
        self.ledger.write("attempt", attempt=self.attempt, nodes=sorted(set(self.places)), left_out=out)
        for rank in range(job.processes):
            self._fork(rank)
        self._await_forks()
        self._make_watch()

    def _fork(self, rank: int) -> None:
        place = {"node": self.places[rank], "attempt": self.attempt, "root": self.root, "errors": self._errors(rank)}
        log_to = self._logs() / f"rank-{rank}.log" if rank or os.environ.get(BACKGROUND) else None
        self.line.send({"fork": self.job.order(rank, **place, log=log_to)})

    def _await_forks(self) -> None:
        deadline = time.monotonic() + 30
        while len(self.ranks) < self.job.processes and time.monotonic() < deadline:
            for message in self.line.messages(TICK_S):
                if "forked" in message:
                    self.ranks[message["rank"]] = message["forked"]

    def _make_watch(self) -> None:
        self.boards = {n: Board(self.root / n / "board", self.job.processes) for n in set(self.places)}
        self.watches = {
            node: Watch(board, self.job.settings.detect, self.root / node / "errors")
            for node, board in self.boards.items()
        }

    def _board(self, rank: int) -> Any:
        return self.boards[self.places[rank]].read(rank)

    def _logs(self) -> Path:
        folder = self.out / WORK / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _errors(self, rank: int) -> Path:
        return self.root / self.places[rank] / "errors"

    # --- watching

    def _watch(self) -> Fault | None:
        """Until something is wrong (a fault), or all ranks have ended as they should (None)."""
        while True:
            try:
                exits = [m for m in self.line.messages(TICK_S) if "exited" in m]
            except ConnectionError:
                return Fault(kind="zygote", rank=None, why="the process that forks ranks is gone, and they with it")
            for message in exits:
                self._note_exit(message)
            bad = [message for message in exits if blame.is_bad(message)]
            if bad:
                return self._judge_exits(bad)
            if not self.ranks:
                return self._drain_done()
            for node, watch in self.watches.items():
                mine = {rank: pid for rank, pid in self.ranks.items() if self.places[rank] == node}
                if mine and (findings := watch.tick(mine)):
                    return self._hang(findings)
            self._look_for_drains()
            if self.asked:
                self._leave()
                return None

    def _note_exit(self, message: dict[str, Any]) -> None:
        if self.ranks.get(message["rank"]) in (message["exited"], None):
            self.ranks.pop(message["rank"], None)
            if message["status"] == 0 and not message["signal"]:
                self.done.add(message["rank"])

    def _judge_exits(self, bad: list[dict[str, Any]]) -> Fault:
        """Who was first? Some are reported together, and a victim sometimes before who it was."""
        first = min(bad, key=self._degree)
        if self._degree(first) == blame.VICTIM:
            time.sleep(0.05)
            more = [m for m in self.line.messages(0) if "exited" in m]
            for message in more:
                self._note_exit(message)
            first = min(bad + [message for message in more if blame.is_bad(message)], key=self._degree)
        return blame.fault_of(first, self._errors, self._board(first["rank"]).beat.alive_s)

    def _degree(self, message: dict[str, Any]) -> int:
        return blame.degree(message, self._errors)

    def _hang(self, findings: list[Finding]) -> Fault:
        first, why = findings[0], "; ".join(map(str, findings))
        since = time.monotonic() - first.silent_s
        return Fault(kind="hang", rank=first.rank, why=why, since_s=since, stack=first.stack)

    def _kill_all(self) -> None:
        for pid in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        with contextlib.suppress(ConnectionError):
            while self.ranks and time.monotonic() < deadline:
                for message in self.line.messages(TICK_S):
                    if "exited" in message and self.ranks.get(message["rank"]) == message["exited"]:
                        del self.ranks[message["rank"]]
        self.ranks.clear()
        log.mend_terminal()  # rank 0's bar

    # --- leaving

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def _leave(self) -> None:
        """Ask the ranks to save and end; those that do not are killed."""
        for pid in self.ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + self.job.settings.leave_s
        with contextlib.suppress(ConnectionError):
            while self.ranks and time.monotonic() < deadline:
                for message in self.line.messages(TICK_S):
                    if "exited" in message:
                        self._note_exit(message)
        self._kill_all()

    def _look_for_drains(self) -> None:
        folder = self.out / WORK / DRAIN
        if not folder.is_dir():
            return
        wanted = {p.name for p in folder.iterdir()} & set(self.places) - self.drained
        if wanted:
            self.drained |= wanted
            self._leave()

    def _drain_done(self) -> Fault | None:
        wanted = sorted(self.drained & set(self.places))
        if not wanted or self.asked or len(self.done) == self.job.processes:
            return None
        nodes_left = [node for node in self.job.nodes if node not in self.drained]
        if len(nodes_left) * self.job.each < self.job.processes:
            log.info(f"{', '.join(wanted)} is drained and there is no other node: the same command goes on later")
            return None
        return Fault(kind="drain", rank=None, why=f"{', '.join(wanted)} is wanted for maintenance")

    # --- taking over from a supervisor that died

    def _adopt(self) -> bool:
        """Take over what is there, and what became of it meanwhile; False if there is nothing, or a fault."""
        if not self.takes_over or not self.places:
            return False
        self.line.send({"list": True})
        known, exits, deadline = None, [], time.monotonic() + 10
        while known is None and time.monotonic() < deadline:
            for message in self.line.messages(TICK_S):
                known = message.get("ranks", known)
                exits += [message] if "exited" in message else []
        self.ranks = {about["rank"]: int(pid) for pid, about in (known or {}).items()}
        for message in exits:
            self._note_exit(message)
        self._make_watch()
        if len(self.ranks) + len(self.done) < self.job.processes:  # some died while nobody watched
            self._kill_all()
            return False
        log.info(f"another supervisor takes over {len(self.ranks)} ranks")
        return True

    def _remember(self) -> None:
        state = {"attempt": self.attempt, "restarts": config.to_json(self.restarts), "places": self.places}
        write_atomic(self.root / "supervisor.json", json.dumps({**state, "drained": sorted(self.drained)}))

    def _recall(self) -> None:
        try:
            state = json.loads((self.root / "supervisor.json").read_text())
        except (OSError, ValueError):
            return
        self.attempt, self.places, self.drained = state["attempt"], state["places"], set(state["drained"])
        self.restarts = config.from_json(RestartState, state["restarts"])
