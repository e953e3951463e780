"""The state of a run in progress, so that a killed one continues as if nothing had happened.

A state is a folder `state-000120/` in the stage's scratch: weights, optimiser moments and the running average as one
safetensors file, and `state.json` with the step, the length of the log, and the tensors' content hash. It is written
under another name and renamed when whole. The newest *valid* state is used; one that fails its hash is set aside under
`damaged-…` and named in the log, and the one before it is used instead.

Nothing else is needed: data is addressed by the step, and no random numbers are drawn during training.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from puna import log
from puna.artifacts import hash_file, write_atomic

KEPT = 2  # the newest, and one more in case the newest is damaged


@dataclass(kw_only=True)
class RunState:
    """Where a run stands after `step` steps."""

    step: int
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    average: dict[str, Tensor]  # sums of weights, empty before the anneal
    averaged: int  # how many are in the sums
    log_bytes: int = 0  # length of metrics.jsonl at this step


def save(state: RunState, folder: Path) -> None:
    """Write the state into `folder`, atomically, and remove all but the newest `KEPT`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"state-{state.step:08d}"
    temporary = folder / f"{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_file(_tensors(state), temporary / "tensors.safetensors")
    record = {
        "step": state.step,
        "averaged": state.averaged,
        "log_bytes": state.log_bytes,
        "hash": hash_file(temporary / "tensors.safetensors"),
    }
    write_atomic(temporary / "state.json", json.dumps(record))
    with (temporary / "tensors.safetensors").open("rb") as file:
        os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    os.replace(temporary, target)
    for old in _states(folder)[:-KEPT]:
        shutil.rmtree(old)


def restore(state: RunState, folder: Path) -> bool:
    """Fill `state` from the newest valid state in `folder`; False if there is none."""
    for path in reversed(_states(folder)):
        try:
            record = json.loads((path / "state.json").read_text())
            if hash_file(path / "tensors.safetensors") != record["hash"]:
                raise ValueError("content does not match its hash")
            _fill(state, load_file(path / "tensors.safetensors"))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log.warn(f"set aside a damaged checkpoint, {aside}: {error}")
            continue
        state.step, state.averaged, state.log_bytes = record["step"], record["averaged"], record["log_bytes"]
        return True
    return False


def _states(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("state-*") if p.is_dir() and not p.name.endswith(".tmp"))


def _tensors(state: RunState) -> dict[str, Tensor]:
    tensors = {f"model.{name}": p.detach() for name, p in state.model.named_parameters()}
    for number, optimizer in enumerate(state.optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{key}": value for key, value in moments.items()}
    tensors |= {f"average.{name}": value for name, value in state.average.items()}
    return {name: value.contiguous() for name, value in tensors.items()}


@torch.no_grad()
def _fill(state: RunState, tensors: dict[str, Tensor]) -> None:
    for name, parameter in state.model.named_parameters():
        parameter.copy_(tensors[f"model.{name}"])
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in state.optimizers]
    average = {}
    for name, value in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "optimizer":
            number, index, key = rest.split(".")
            moments[int(number)].setdefault(int(index), {})[key] = value
        elif kind == "average":
            average[rest] = value
    for optimizer, restored in zip(state.optimizers, moments, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": restored, "param_groups": groups})
    state.average = average
