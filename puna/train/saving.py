"""States of a run in a folder, for a process that nobody watches.

A state is a folder `state-000120/`: the tensors as one safetensors file, and `state.json` with the record and the
tensors' content hash. It is written under another name and renamed when whole. The newest *valid* state is used; one
that fails its hash is set aside under `damaged-…` and named in the log, and the one before it is used instead.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from puna import log
from puna.artifacts import hash_file, write_atomic
from puna.train import state
from puna.train.state import Run

KEPT = 2  # the newest, and one more in case the newest is damaged


def save(run: Run, folder: Path) -> None:
    """Write the state of `run` into `folder`, atomically, and remove all but the newest `KEPT`.

    The first rank writes it, whole: a run may go on with other processes than it was saved by.
    """
    tensors, record = state.capture(run)
    whole = {name: value.contiguous() for name, value in run.placement.join(tensors.items())}
    if run.placement.rank == 0:
        _write(whole, record, folder, folder / f"state-{run.position.step:08d}")
    run.placement.most(0)  # nobody goes on before the state is safe


def _write(tensors: dict[str, Tensor], record: dict[str, Any], folder: Path, target: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(tensors, temporary / "tensors.safetensors")
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
    while (chosen := run.placement.most(_newest(folder, most) if run.placement.rank == 0 else -1)) >= 0:
        path = folder / f"state-{chosen:08d}"
        failed = ""
        try:
            record = json.loads((path / "state.json").read_text())
            state.fill(run, load_file(path / "tensors.safetensors"), record)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            failed = str(error) or repr(error)
        if not run.placement.most(bool(failed)):
            return True
        if run.placement.rank == 0:
            _set_aside(path, failed or "another process could not read it")
    return False


def _newest(folder: Path, most: int | None) -> int:
    """The step of the newest state whose content matches its hash; -1 if there is none. Others are set aside."""
    for path in reversed(_states(folder)):
        step = int(path.name.removeprefix("state-"))
        if most is not None and step > most:
            continue
        try:
            record = json.loads((path / "state.json").read_text())
            if hash_file(path / "tensors.safetensors") != record["hash"]:
                raise ValueError("content does not match its hash")
        except (OSError, ValueError, KeyError, TypeError) as error:
            _set_aside(path, str(error) or repr(error))
            continue
        return step
    return -1


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    log.warn(f"set aside a damaged checkpoint, {aside}: {why}")


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("state-*") if p.is_dir() and not p.name.endswith(".tmp"))
