"""Where a run's processes meet on a machine: a folder in shared memory, named after the run.

    /dev/shm/puna-<user>-<run>/      a node's memory, as long as the run is unfinished
      home                           the run's folder on disk
      <node>/                        board, images, what dying ranks said
      zygote                         the socket on which ranks are forked

PUNA_SHARED_MEMORY names another folder than `/dev/shm`, for containers in which that is small.

The launcher tells its ranks by PUNA_MEMORY and PUNA_ATTEMPT; torchrun's agent is recognised by its own variables. A rank
that nobody supervises puts its images beside the states on disk, so that nothing stays in memory when it dies.
"""

import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puna.artifacts import WORK, write_atomic
from puna.errors import PunaError


@dataclass(frozen=True, kw_only=True)
class Home:
    """A run's meeting place. `attempt` counts its starts."""

    root: Path
    supervised: bool
    attempt: int = 0
    by_torchrun: bool = False

    @classmethod
    def of_rank(cls, out: Path, peers: Any) -> "Home":
        """For a rank, however it was started. Every rank must call it."""
        given = os.environ.get("PUNA_MEMORY")
        if given:
            return cls(root=Path(given), supervised=True, attempt=int(os.environ.get("PUNA_ATTEMPT", "0")))
        if "TORCHELASTIC_RUN_ID" in os.environ:
            run = peers.gather(run_id(out) if peers.rank == 0 else None)[0]
            count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
            return cls(root=open_root(run, out), supervised=True, attempt=count, by_torchrun=True)
        root = out / WORK / "staging"
        root.mkdir(parents=True, exist_ok=True)
        return cls(root=root, supervised=False)

    def node(self, name: str) -> Path:
        """The folder of one node; made if need be."""
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        return folder

    def give_back(self) -> None:
        """Remove everything: the run is finished. A launcher does that itself."""
        if "PUNA_MEMORY" not in os.environ:
            shutil.rmtree(self.root, ignore_errors=True)


def is_supervised() -> bool:
    """Was this process started by our launcher, or by torchrun?"""
    return "PUNA_MEMORY" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def run_id(out: Path) -> str:
    """The run's name, drawn when its folder is made: another run at the same place has another."""
    path = out / WORK / "run"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        write_atomic(path, uuid.uuid4().hex[:12])
    return path.read_text()


def open_root(run: str, out: Path) -> Path:
    """Make the run's folder in shared memory. Gives back what runs left there whose folder on disk is gone."""
    usual = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    shm = Path(os.environ.get("PUNA_SHARED_MEMORY") or usual)
    if not shm.is_dir():
        raise PunaError(f"PUNA_SHARED_MEMORY={shm} is not a folder", hint="make it, on a file system in memory")
    folder = shm / f"puna-{os.getuid()}-{run}"
    for other in shm.glob(f"puna-{os.getuid()}-*"):
        note = other / "home"
        if other != folder and note.is_file() and not (Path(note.read_text()) / WORK / "run").is_file():
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomic(folder / "home", str(out.resolve()))
    return folder
