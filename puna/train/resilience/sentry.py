"""The watch where torchrun starts the ranks: a process per node that kills a rank which hangs.

torchrun's agent starts ranks and, when one dies, all of them again; one that is stopped or stuck it does not notice, and
the others wait for PyTorch's timeout, which is minutes. The first rank of a node starts this process, which reads the
board as the supervisor does, writes down who hangs where, and kills it: then the agent does its part. It outlives the
ranks, and ends with the agent.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from puna import config, log
from puna.planner.policies import DetectPolicy
from puna.train.resilience import nodes
from puna.train.resilience.board import Board, Line
from puna.train.resilience.ledger import Ledger
from puna.train.resilience.watch import Watch, process_state

ENDED = "ended"  # the last phase of a rank that has nothing more to do
TICK_S = 0.1


def start(node: Path, out: Path, world: int, policy: DetectPolicy) -> None:
    """Start a sentry for this node, unless there is one: called by a rank, whose parent is torchrun's agent."""
    arguments = [str(node), str(out), str(world), json.dumps(config.to_json(policy)), str(os.getppid())]
    command = [sys.executable, "-m", "puna.train.resilience.sentry", *arguments]
    subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)


def main() -> None:
    node, out, world, policy, agent = sys.argv[1:]
    with (Path(node) / "sentry.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        Sentry(Path(node), Path(out), int(world), config.from_json(DetectPolicy, json.loads(policy))).watch(int(agent))


class Sentry:
    """Watches the ranks of one node."""

    def __init__(self, node: Path, out: Path, world: int, policy: DetectPolicy):
        self.node, self.out = node, out
        self.board = Board(node / "board", world)
        self.eyes = Watch(self.board, policy, node / "errors")
        self.ledger = Ledger(out)
        self.known: dict[int, int] = {}  # rank -> pid
        self.told: int | None = None  # the start of the ranks of which a fault was told: the others die of the first

    def watch(self, agent: int) -> None:
        """As long as the agent lives."""
        while process_state(agent)[:1] not in ("", "Z"):
            time.sleep(TICK_S)
            self._look()

    def _look(self) -> None:
        lines = {rank: self.board.read(rank) for rank in range(self.board.world)}
        alive = {rank: line.pid for rank, line in lines.items() if line.pid and _lives(line)}
        died = [rank for rank, pid in self.known.items() if lines[rank].pid == pid and rank not in alive]
        if died and lines[died[0]].phase not in (ENDED, "leaving"):
            since = time.time() - (time.monotonic() - lines[died[0]].beat.alive_s)
            self._note("killed", died[0], lines[died[0]], since, "the process died")
        if alive != self.known:
            self.known = alive
            self.eyes.restart()
            return
        for finding in self.eyes.tick(alive):
            log.warn(str(finding))
            self._note("hang", finding.rank, lines[finding.rank], time.time() - finding.silent_s, str(finding))
            with contextlib.suppress(ProcessLookupError):
                os.kill(alive[finding.rank], signal.SIGKILL)
            self.known.pop(finding.rank, None)

    def _note(self, kind: str, rank: int, line: Line, since: float, why: str) -> None:
        if line.attempt == self.told:
            return
        self.told = line.attempt
        self.ledger.write("fault", kind=kind, rank=rank, node=self.node.name, step=line.step, since=since, why=why)
        nodes.note(self.out, self.node.name, kind)


def _lives(line: Line) -> bool:
    return bool(state := process_state(line.pid)) and not state.startswith("Z") and line.phase != ENDED


if __name__ == "__main__":
    main()
