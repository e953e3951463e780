"""Saving beside the training: one thread copies into memory, another from memory to disk.

The tensors of a state do not change between two updates, so copying them overlaps with the next step's forward and
backward; only the update waits for its end (`settle`). Disk is slower by far, and nobody waits for it, unless all slots
are taken when a durable state is due.
"""

import queue
import threading
import time
from collections.abc import Callable

from puna import log
from puna.train.resilience import image
from puna.train.resilience.durable import DurableTier
from puna.train.resilience.image import Seal, Snapshot
from puna.train.resilience.memory import MemoryTier
from puna.train.resilience.sharing import Sharing


class Saver:
    """The two threads. `report` is told what was saved, and what could not be."""

    def __init__(
        self, memory: MemoryTier, durable: DurableTier, report: Callable[..., None], sharing: Sharing | None = None
    ):
        self.memory, self.durable, self.report, self.sharing = memory, durable, report, sharing
        self.newest: tuple[int | None, Seal] | None = None  # slot and seal of the last copy; no slot: no room for it
        self.failure: BaseException | None = None  # of copying
        self._no_room = False  # the last copy to memory failed
        self._orders: queue.Queue[Snapshot] = queue.Queue()
        self._queue: queue.Queue[tuple[int, Seal] | None] = queue.Queue()
        threading.Thread(target=self._copy_all, name="memory", daemon=True).start()
        threading.Thread(target=self._write_all, name="durable", daemon=True).start()

    def start(self, snapshot: Snapshot, *, must: bool = False) -> None:
        """Begin to copy `snapshot`. With `must`, wait for a slot rather than leave it out."""
        self.settle()
        if must:
            self._await_slot()
        self._orders.put(snapshot)

    def settle(self) -> None:
        """Wait until the copy is whole: before any tensor of it may change. Raises what went wrong with it."""
        self._orders.join()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def publish(self, slot: int, seal: Seal) -> None:
        """Bring a slot to the disk, beside the training."""
        with self.memory.lock:
            self.memory.busy.add(slot)
        self._queue.put((slot, seal))

    def publish_now(self, slot: int, seal: Seal) -> None:
        """Bring a slot to the disk and wait for it: before leaving."""
        self.durable.save(seal, self.memory.image_path(slot))

    def drain(self) -> None:
        """Wait until all is on disk that was published."""
        self.settle()
        self._queue.join()

    def forget_after(self, step: int) -> None:
        """Remove all copies in memory of more than `step` steps, also those of another node's parts."""
        self.memory.forget_after(step)
        if self.sharing is not None:
            self.sharing.store.forget_after(step)

    def _copy_all(self) -> None:
        """One thread for all copies: to start one for each would cost the training a switch of Python's lock, 5 ms."""
        while True:
            self._copy(self._orders.get())
            self._orders.task_done()

    def _copy(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        try:
            self.newest = self._keep(snapshot)
            if self.sharing is not None:
                self.sharing.send(self.memory, self.newest)
        except BaseException as failure:
            self.failure = failure
            return
        self.report(
            "memory", step=snapshot.step, seconds=time.perf_counter() - started, kept=self.newest[0] is not None
        )

    def _keep(self, snapshot: Snapshot) -> tuple[int | None, Seal]:
        try:
            kept = self.memory.save(snapshot)
        except OSError as error:  # memory is full
            self._say_no_room(snapshot.step, error.strerror or str(error))
            kept = None
        if kept is not None:
            self._no_room = False
            return kept
        return None, self.memory.seal_of(snapshot, image.hash_of(snapshot))  # replicas can be compared all the same

    def _say_no_room(self, step: int, reason: str) -> None:
        """Once, until there is room again: it may be every step."""
        if not self._no_room:
            log.warn(f"step {step} could not be copied to memory: {reason}; training goes on, trying at each step")
            self.report("memory_failed", step=step, why=reason)
        self._no_room = True

    def _await_slot(self) -> None:
        while len(self.memory.busy) >= 2:
            time.sleep(0.005)

    def _write_all(self) -> None:
        while True:
            slot, seal = self._queue.get()
            self._write(slot, seal)
            with self.memory.lock:
                self.memory.busy.discard(slot)
            self._queue.task_done()

    def _write(self, slot: int, seal: Seal) -> None:
        started = time.perf_counter()
        try:
            complete = self.durable.save(seal, self.memory.image_path(slot))
        except OSError as error:
            reason = error.strerror or str(error)
            log.warn(
                f"step {seal.step} could not be saved on disk: {reason}; training goes on, trying at the next save"
            )
            self.report("save_failed", step=seal.step, why=reason)
            return
        self.report("durable", step=seal.step, seconds=time.perf_counter() - started, complete=complete)
