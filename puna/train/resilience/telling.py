"""What a run says of its safety: a line of the ledger, a word to the user, a mark against a node. Rank 0 speaks for all."""

from pathlib import Path
from typing import Any

from puna import log
from puna.train.resilience import nodes
from puna.train.resilience.ledger import Ledger
from puna.train.resilience.peers import Peers


class Telling:
    """Every rank has one; only rank 0's does something."""

    def __init__(self, out: Path, peers: Peers):
        self.out, self.peers = out, peers
        self._ledger = Ledger(out) if peers.rank == 0 else None

    def ledger(self, event: str, **values: Any) -> None:
        """Note that `event` ended now."""
        if self._ledger is not None:
            self._ledger.write(event, **values)

    def say(self, text: str) -> None:
        """Warn whoever reads the log."""
        if self.peers.rank == 0:
            log.warn(text)

    def accuse(self, ranks: list[int], step: int, why: str) -> None:
        """These ranks computed something wrong in or before `step`: their nodes get a mark."""
        for rank in ranks:
            node = self.peers.nodes[rank]
            self.say(f"rank {rank} on {node} had a wrong number in or before step {step}: {why}")
            if self.peers.rank == 0:
                nodes.note(self.out, node, "corruption")
                self.ledger("accused", rank=rank, node=node, step=step, kind="corruption")

    def slow(self, rank: int, score: float) -> None:
        """This rank takes `score` times as long as others for the same work."""
        node = self.peers.nodes[rank]
        self.ledger("slow", rank=rank, node=node, score=round(score, 3))
        nodes.note(self.out, node, "slow")
