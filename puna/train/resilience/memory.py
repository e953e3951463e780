"""The memory tier: the last few steps of a run, in the machine's memory, where a killed process cannot take them along.

Images lie in files of `/dev/shm`, which is memory that belongs to no process. A rank has a few slots and writes them in
turns; the newest one that is known to be right (`verified`) is never written over, nor is one that is being copied to
disk. Replicas of a part hold equal bytes, so on one machine only the first of them keeps an image. The others are its
*witnesses*: each keeps a seal with the hash of its own tensors. Where a witness disagrees, one of them holds a wrong
number, and a restart does not trust that step.

    <root>/<node>/part-0003/slot-1.safetensors   the image        <root>/<node>/part-0003/replica-0/slot-1.seal   its seal
    <root>/<node>/copy-0005/...                  the same, of another node's part (puna/train/resilience/sharing.py)
"""

import threading
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from puna.train.resilience import image
from puna.train.resilience.image import Seal, Snapshot

SLOTS = 3  # two in turns, and one that is kept because it is verified


class MemoryTier:
    """One rank's slots. `save` is called from the thread that `Guard` runs beside the training."""

    def __init__(
        self, folder: Path, *, part: int = 0, parts: int = 1, replica: int = 0, holds: bool = True, copy: bool = False
    ):
        self.folder = folder / f"{'copy' if copy else 'part'}-{part:04d}"
        self.part, self.parts, self.replica, self.holds = part, parts, replica, holds
        self.seals = self.folder / f"replica-{replica}"
        self.seals.mkdir(parents=True, exist_ok=True)
        self._maps: dict[int, Tensor] = {}
        self.busy: set[int] = set()  # slots that are being copied to disk
        self.lock = threading.Lock()

    def save(self, snapshot: Snapshot) -> tuple[int, Seal] | None:
        """Keep `snapshot`: the slot's number and its seal, or None if every slot is in use."""
        slot = self._take()
        if slot is None:
            return None
        if self.holds:
            memory = self._memory(slot, image.size(snapshot))
            image.write(snapshot, memory)
            digest = image.hash_memory(memory)
        else:
            digest = image.hash_of(snapshot)
        seal = self.seal_of(snapshot, digest)
        seal.write(self._path(slot))
        return slot, seal

    def seal_of(self, snapshot: Snapshot, digest: str) -> Seal:
        """The seal of an image with this hash."""
        return Seal(
            step=snapshot.step,
            generation=snapshot.generation,
            size=image.size(snapshot),
            hash=digest,
            record=dict(snapshot.record),
            part=self.part,
            parts=self.parts,
        )

    def discard(self, slot: int) -> None:
        """Forget a slot and its image."""
        self._path(slot).unlink(missing_ok=True)
        self.image_path(slot).unlink(missing_ok=True)
        self._maps.pop(slot, None)

    def keep(self, seal: Seal, received: Tensor) -> None:
        """Keep an image that came from another node."""
        slot = self._take()
        if slot is not None:
            self._memory(slot, seal.size).copy_(received)
            seal.write(self._path(slot))

    def verify(self, key: tuple[int, int]) -> None:
        """Note that the replicas agree on the state `key`."""
        for slot, seal in self.sealed().items():
            if seal.key == key and not seal.verified:
                replace(seal, verified=True).write(self._path(slot))

    def forget_unverified(self) -> None:
        """Remove all states on which the replicas were not compared: one of them is wrong."""
        for slot, seal in self.sealed().items():
            if not seal.verified:
                self._path(slot).unlink(missing_ok=True)

    def forget_after(self, step: int) -> None:
        """Remove all states of more than `step` steps."""
        for slot, seal in self.sealed().items():
            if seal.step > step:
                self._path(slot).unlink(missing_ok=True)

    def sealed(self) -> dict[int, Seal]:
        """Slot -> seal, of this replica's whole slots."""
        return _seals(self.seals)

    def image_path(self, slot: int) -> Path:
        """Where a slot's image lies."""
        return self.folder / f"slot-{slot}.safetensors"

    def _path(self, slot: int) -> Path:
        return self.seals / f"slot-{slot}.seal"

    def _take(self) -> int | None:
        """A slot that may be written to; it has no seal any more."""
        with self.lock:
            slot = self._free()
        if slot is not None:
            self._path(slot).unlink(missing_ok=True)
        return slot

    def _free(self) -> int | None:
        sealed = self.sealed()
        empty = [slot for slot in range(SLOTS) if slot not in sealed and slot not in self.busy]
        if empty:
            return empty[0]
        verified = [slot for slot, seal in sealed.items() if seal.verified]
        kept = max(verified, key=lambda slot: sealed[slot].key, default=None)
        rest = [slot for slot in sealed if slot != kept and slot not in self.busy]
        return min(rest, key=lambda slot: sealed[slot].key, default=None)

    def _memory(self, slot: int, length: int) -> Tensor:
        memory = self._maps.get(slot)
        if memory is None or memory.numel() != length:
            memory = self._maps[slot] = image.mapped(self.image_path(slot), length)
        return memory


def _seals(folder: Path) -> dict[int, Seal]:
    found = {}
    for path in folder.glob("slot-*.seal"):
        try:
            found[int(path.stem.removeprefix("slot-"))] = Seal.read(path)
        except (OSError, ValueError, TypeError):  # damaged, or replaced this moment: it does not count
            continue
    return found


def available(folder: Path) -> dict[int, dict[tuple[int, int], tuple[Seal, Path]]]:
    """What a node's memory holds: part -> key -> (seal, image), without the steps on which witnesses disagree.

    Its own images come before copies of another node's: where ranks moved, it may have both.
    """
    found: dict[int, dict[tuple[int, int], tuple[Seal, Path]]] = {}
    for part in (*sorted(folder.glob("part-*")), *sorted(folder.glob("copy-*"))):
        hashes: dict[tuple[int, int], set[str]] = {}
        images: dict[tuple[int, int], tuple[Seal, Path]] = {}
        for replica in sorted(part.glob("replica-*")):
            for slot, seal in _seals(replica).items():
                hashes.setdefault(seal.key, set()).add(seal.hash)
                path = part / f"slot-{slot}.safetensors"
                if replica.name == _holder(part) and path.is_file():
                    images[seal.key] = seal, path
        agreed = {key: value for key, value in images.items() if len(hashes[key]) == 1}
        if agreed:
            number = int(part.name.split("-")[1])
            found[number] = agreed | found.get(number, {})
    return found


def _holder(part: Path) -> str:
    return min((p.name for p in part.glob("replica-*")), key=lambda name: int(name.removeprefix("replica-")))


def read(seal: Seal, path: Path) -> Tensor:
    """The image of a seal. Raises `ValueError` if it is not the one that was sealed."""
    if path.stat().st_size != seal.size:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, its seal says {seal.size:,}")
    memory = image.mapped(path)
    if image.hash_memory(memory) != seal.hash:
        raise ValueError(f"{path.name} does not match its hash")
    return memory
