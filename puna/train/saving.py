"""States of a run in a folder, for a process that nobody watches.

A state is a folder `state-000120/`: the tensors as one safetensors file, and `state.json` with the record and the
tensors' content hash. It is written under another name and renamed when whole. The newest *valid* state is used; one
that fails its hash is set aside under `damaged-…` and named in the log, and the one before it is used instead.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from puna import log
from puna.artifacts import hash_file, write_atomic
from puna.train import state
from puna.train.state import Run

KEPT = 2  # the newest, and one more in case the newest is damaged


def save(run: Run, folder: Path) -> None:
    """Write the state of `run` into `folder`, atomically, and remove all but the newest `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"state-{run.position.step:08d}"
    temporary = folder / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors, record = state.capture(run)
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary / "tensors.safetensors")
    record["hash"] = hash_file(temporary / "tensors.safetensors")
    write_atomic(temporary / "state.json", json.dumps(record))
    with (temporary / "tensors.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old)


def restore(run: Run, folder: Path, most: int | None = None) -> bool:
    """Fill `run` from the newest valid state in `folder` (of at most `most` steps); False if there is none."""
    for path in reversed(_states(folder)):
        if most is not None and int(path.name.removeprefix("state-")) > most:
            continue
        try:
            record = json.loads((path / "state.json").read_text())
            if hash_file(path / "tensors.safetensors") != record["hash"]:
                raise ValueError("content does not match its hash")
            state.fill(run, load_file(path / "tensors.safetensors"), record)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log.warn(f"set aside a damaged checkpoint, {aside}: {error}")
            continue
        return True
    return False


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("state-*") if p.is_dir() and not p.name.endswith(".tmp"))
