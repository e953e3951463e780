"""What a rank keeps of its run: states in memory and on disk, when they are made, and the way back to one.

`capture(run)` gives the tensors of this rank, a record of plain values, and which tensors are pieces of larger ones;
`fill(run, tensors, record)` puts pieces back, or wholes that were saved on another layout.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from puna.artifacts import WORK
from puna.parallel.placement import Cut
from puna.train.resilience.durable import DurableTier
from puna.train.resilience.image import Snapshot
from puna.train.resilience.memory import MemoryTier
from puna.train.resilience.peers import Peers
from puna.train.resilience.restore import Found, newest
from puna.train.resilience.saver import Saver
from puna.train.resilience.sharing import Sharing
from puna.train.resilience.telling import Telling

Capture = Callable[[Any], tuple[dict[str, Tensor], dict[str, Any], Cut]]
Fill = Callable[[Any, dict[str, Tensor], dict[str, Any]], None]


class Keeping:
    """One rank's states. `node` is its folder in shared memory; `shares` says that a lost node may be replaced."""

    def __init__(
        self,
        out: Path,
        node: Path,
        peers: Peers,
        tell: Telling,
        *,
        kept: int,
        shares: bool,
        capture: Capture,
        fill: Fill,
        layout: str,
    ):
        self.node, self.peers, self.tell, self.layout = node, peers, tell, layout
        self.capture, self.fill_run = capture, fill
        self.durable = DurableTier(out / WORK, kept=kept)
        place = {"part": peers.part, "parts": peers.parts, "replica": peers.replica}
        self.memory = MemoryTier(node, **place, holds=peers.first_on_node)
        self.saver = Saver(self.memory, self.durable, self._note, self._sharing() if shares else None)
        self.generation = 0
        self.due: tuple[int, int] | None = None  # the state whose replicas are to be compared before the next update
        self._unpublished = False  # whether the newest copy goes to disk as soon as it is whole
        self._whole = threading.Lock()  # held while the state is between two steps
        self._changing = False  # the training holds it

    def _sharing(self) -> Sharing | None:
        """Where another node's loss would take the only copy of a part along, the ranks send theirs around."""
        neighbour = self.peers.neighbour()
        if neighbour is None:
            return None
        to, source = neighbour
        store = MemoryTier(self.node, part=self.peers.all_parts[source], parts=self.peers.parts, copy=True)
        return Sharing(self.peers, store, to=to, source=source)

    # --- saving

    def save(self, run: Any, more: dict[str, Any], *, durable: bool, checked: bool = False) -> None:
        """Begin to copy the state of `run`, with `more` in its record. With `durable` it goes to disk as well: at once,
        or, with `checked`, when the replicas were compared."""
        tensors, record, cut = self.capture(run)
        record = json.loads(
            json.dumps({**record, **more, "layout": self.layout})
        )  # the run goes on while it is written
        snapshot = Snapshot(step=run.position.step, generation=self.generation, tensors=tensors, record=record, cut=cut)
        self.saver.start(snapshot, must=durable or checked)
        if checked:
            self.due = snapshot.key
        self._unpublished = durable and not checked

    def settle(self) -> None:
        """Wait until the copy is whole: before an update."""
        self.saver.settle()
        if self._unpublished:
            self._unpublished = False
            self.publish()

    def publish(self) -> None:
        """Bring the newest copy to the disk, beside the training."""
        if self.saver.newest is None or self.peers.replica != 0:
            return
        slot, seal = self.saver.newest
        if slot is None:
            self._note("save_failed", step=seal.step, why="there is no memory left to copy the state to")
        else:
            self.saver.publish(slot, seal)

    # --- going back

    def newest(self, most: int | None) -> Found | None:
        """The newest state of at most `most` steps; if all are newer, the newest of these."""
        for limit in (most,) if most is None else (most, None):
            found = newest(self.peers, self.node, self.durable, layout=self.layout, most=limit)
            if found is not None:
                return found
        return None

    def forget_unverified(self) -> None:
        """One of the replicas is wrong since they were last equal, and nobody knows in which of the copies."""
        if self.peers.replicas > 1:
            self.memory.forget_unverified()

    def forget_after(self, step: int, why: str) -> None:
        """No state of more than `step` steps is to be trusted."""
        self.saver.drain()
        self.saver.forget_after(step)
        if self.peers.rank == 0:
            for state in self.durable.states():
                if state.step > step:
                    self.durable.quarantine(state, [why])
        self.peers.gather(None)  # nobody looks for a state before all have forgotten

    def fill(self, run: Any, found: Found) -> None:
        """Put a state back."""
        self.fill_run(run, found.tensors, dict(found.record))
        self.generation, self.due, self._unpublished = found.key[0], None, False

    # --- while the state changes, nobody else looks at it

    def hold(self) -> None:
        """The state is about to change."""
        if not self._changing:
            self._whole.acquire()
            self._changing = True

    def release(self) -> None:
        """It is that of whole steps."""
        if self._changing:
            self._changing = False
            self._whole.release()

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """Within it, nobody else looks at the state."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def leave(self, run: Any, more: dict[str, Any], *, within_s: float) -> None:
        """From another thread, in the middle of a step: bring the newest whole steps to the disk."""
        if self._whole.acquire(timeout=within_s):  # an update that is under way is finished first
            self.saver.settle()
            newest = self.saver.newest
            if newest is None or newest[1].key != (self.generation, run.position.step):
                self.save(run, more, durable=False)
                self.saver.settle()
        copies = 2 if self.peers.parts > 1 else 1  # ranks may be a step apart: two states, of which all have one
        for slot, seal in sorted(self.memory.sealed().items(), key=lambda s: s[1].key, reverse=True)[:copies]:
            if self.memory.holds and self.peers.replica == 0:
                self.saver.publish_now(slot, seal)

    def _note(self, event: str, **values: Any) -> None:
        if event in ("memory_failed", "save_failed", "durable"):
            self.tell.ledger(event, **values)
