"""The durable tier: states on disk, of which the newest *valid* one is used.

    state-00-00000120/               generation (how many times the run was rolled back) and step
      part-0000.safetensors          what the ranks hold, cut as they hold it
      part-0000.seal                 its hash (puna/train/resilience/image.py)
      ...
      state.json                     the seals' hashes; written last: without it the state is not there
    published.json                   the newest state that was ever complete here

Writing goes on beside the training: a slot of the memory tier is copied to a temporary name, brought to the disk
(fsync) and renamed; then its seal. There is no barrier: whichever rank finds all parts sealed publishes the state.

Reading trusts nothing. Every part is compared with its seal, and every seal with `state.json`. A state that fails is
renamed to `damaged-...`, the log says which file and why, and the one before it is used. A folder in which states were
published but none is valid stops the run: starting over would throw the work away without a word.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from puna import log
from puna.artifacts import hash_file, write_atomic
from puna.errors import ArtifactError
from puna.train.resilience import image
from puna.train.resilience.image import Seal

STATE = "state.json"
PUBLISHED = "published.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Saved:
    """A complete state on disk. `check` says what is wrong with it; `read` gives tensors, whole or in part."""

    path: Path
    key: tuple[int, int]
    parts: int

    @property
    def step(self) -> int:
        return self.key[1]

    def check(self, part: int) -> str:
        """What is wrong with one part, in words; empty if it is valid."""
        name = f"part-{part:04d}"
        try:
            listed = _read_state(self.path)["parts"][name]
            seal = Seal.read(self.path / f"{name}.seal")
            file = self.path / f"{name}.safetensors"
            if (seal.hash, seal.size, seal.key) != (listed["hash"], listed["size"], self.key):
                return f"{name}.seal is not the one that {STATE} lists"
            if file.stat().st_size != seal.size:
                return f"{file.name} has {file.stat().st_size:,} bytes instead of {seal.size:,}"
            if hash_file(file) != seal.hash:
                return f"{file.name} does not match its hash"
        except FileNotFoundError as error:
            return f"{Path(error.filename).name} is missing"
        except (OSError, ValueError, KeyError, TypeError, ArtifactError) as error:
            return f"{name}: {error}"
        return ""

    @property
    def record(self) -> dict[str, Any]:
        """What the run noted beside its tensors (of the first part)."""
        return Seal.read(self.path / "part-0000.seal").record

    def part(self, part: int) -> dict[str, Tensor]:
        """The tensors of one part, as its rank held them."""
        return dict(image.tensors(image.mapped(self.path / f"part-{part:04d}.safetensors")))

    def whole(self) -> dict[str, Tensor]:
        """All tensors, put together from their pieces: for another layout than the one that saved them."""
        found: dict[str, Tensor] = {}
        for part in range(self.parts):
            memory = image.mapped(self.path / f"part-{part:04d}.safetensors")
            join(found, dict(image.tensors(memory)), image.cut_of(memory))
        return found


def join(whole: dict[str, Tensor], tensors: dict[str, Tensor], cut: dict[str, Any]) -> None:
    """Put the tensors of one part into `whole`, pieces at their places."""
    for name, tensor in tensors.items():
        if name not in cut:
            whole[name] = tensor
            continue
        shape, start = cut[name]
        target = whole.setdefault(name, torch.empty(shape, dtype=tensor.dtype))
        target[tuple(slice(s, s + n) for s, n in zip(start, tensor.shape))] = tensor


class DurableTier:
    """The states in `folder`. `save` may run in a thread; only one per process at a time."""

    def __init__(self, folder: Path, *, kept: int = 2):
        self.folder = folder
        self.kept = kept
        self.sound: int | None = None  # of the states of at most so many steps, the newest is kept as well
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, seal: Seal, source: Path, *, move: bool = False) -> bool:
        """Bring a sealed image to the disk as part of its state; True if that made the state complete.

        With `move` the image itself becomes the part: it lies on this disk and is not needed any more.

        A full disk is answered by giving up the oldest kept state; `OSError` if that does not help.
        """
        target = self.folder / _name(seal.key)
        try:
            return self._write(seal, source, target, move)
        except OSError as error:
            self._drop_unfinished(target, seal.part)
            older = [s for s in self.states() if s.key < seal.key]
            if error.errno not in _FULL or len(older) < 2:
                raise
            log.warn(f"the disk is full: giving up the state of step {older[0].step} to make room")
            shutil.rmtree(older[0].path, ignore_errors=True)
        try:
            return self._write(seal, source, target, move)
        except OSError:
            self._drop_unfinished(target, seal.part)
            raise

    def _write(self, seal: Seal, source: Path, target: Path, move: bool) -> bool:
        target.mkdir(exist_ok=True)
        file = target / f"part-{seal.part:04d}.safetensors"
        temporary = source if move else file.with_name(f"{file.name}.tmp")
        if not move:
            _copy(source, temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, file)
        seal.write(file.with_suffix(".seal"))
        return self._publish(target, seal)

    def _publish(self, target: Path, seal: Seal) -> bool:
        names = [f"part-{part:04d}" for part in range(seal.parts)]
        try:
            seals = {name: Seal.read(target / f"{name}.seal") for name in names}
        except (OSError, ValueError):  # others are not ready: the last of them publishes
            return False
        parts = {name: {"hash": s.hash, "size": s.size} for name, s in seals.items()}
        _write_state(target, {"step": seal.step, "generation": seal.generation, "parts": parts})
        _sync_folder(target)
        _sync_folder(self.folder)
        write_atomic(self.folder / PUBLISHED, json.dumps({"state": target.name}))
        self._tidy(seal.key)
        return True

    def _tidy(self, newest: tuple[int, int]) -> None:
        states = self.states()
        older = states[: -self.kept] if len(states) > self.kept else []
        vouched = [] if self.sound is None else [state for state in states if state.step <= self.sound][-1:]
        for old in (state for state in older if state not in vouched):
            (old.path / STATE).unlink(missing_ok=True)
            shutil.rmtree(old.path, ignore_errors=True)
        for path in self.folder.glob("state-*"):  # what a killed run left half-written
            if _key(path) < newest and not (path / STATE).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _drop_unfinished(self, target: Path, part: int) -> None:
        for path in target.glob(f"part-{part:04d}*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others write there
            target.rmdir()

    def states(self) -> list[Saved]:
        """Complete states, oldest first. They are not checked yet."""
        found = []
        for path in self.folder.glob("state-*"):
            if (path / STATE).is_file():
                try:
                    parts = len(_read_state(path)["parts"])
                except (OSError, ValueError, KeyError, TypeError):
                    parts = 0  # `check` says what is wrong
                found.append(Saved(path, _key(path), parts))
        return sorted(found, key=lambda state: state.key)

    def quarantine(self, state: Saved, why: Iterable[str]) -> Path:
        """Set a damaged state aside and say so; where it lies now."""
        aside = state.path.with_name(f"damaged-{state.path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(state.path, aside)
        log.warn(f"set aside a damaged checkpoint, {aside}: {'; '.join(why)}")
        return aside

    def refuse_to_start_over(self) -> None:
        """Raises `ArtifactError` if this folder had a state: call when no valid one was found."""
        if not (self.folder / PUBLISHED).is_file():
            return
        try:
            last = json.loads((self.folder / PUBLISHED).read_text())["state"]
        except (ValueError, KeyError, TypeError):
            last = "one whose name cannot be read"
        aside = ", ".join(sorted(p.name for p in self.folder.glob("damaged-*"))) or "nothing"
        raise ArtifactError(
            f"{self.folder} had checkpoints (last: {last}), but none of them is valid; set aside: {aside}",
            hint="restore one from a copy, or delete the folder to start over",
        )


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as written:
        shutil.copyfileobj(read, written, 1 << 22)


def _name(key: tuple[int, int]) -> str:
    return f"state-{key[0]:02d}-{key[1]:08d}"


def _key(path: Path) -> tuple[int, int]:
    try:
        _, generation, step = path.name.split("-")
        return int(generation), int(step)
    except ValueError:
        return -1, -1


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    text = json.dumps(state, sort_keys=True)
    write_atomic(folder / STATE, f"{xxhash.xxh3_128_hexdigest(text.encode())}\n{text}\n")


def _read_state(folder: Path) -> dict[str, Any]:
    digest, _, text = (folder / STATE).read_bytes().partition(b"\n")
    if not text.endswith(b"\n") or xxhash.xxh3_128_hexdigest(text[:-1]).encode() != digest:
        raise ValueError(f"{STATE} does not match its own hash")
    return json.loads(text)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
