"""Faults, on purpose: what the tests, the fault matrix and the soak do to a run.

A plan is a file in the folder `faults` of the run: a list of {"kind", "step", "rank", ...}. A rank calls `at` at points
of its step, and what is planned for it happens there, once: a mark on disk is made first, so that the same fault does
not come again when the step is made again. Faults that come from outside (a signal, a damaged file) have functions of
their own. The time of each is written to `injected.jsonl`, from which detection is measured.

    kill    SIGKILL to itself                    stop    SIGSTOP to itself        hang   waits for ever
    raise   an exception                         abort   os.abort                 oom    takes memory until it is killed
    slow    `seconds` more in each of `steps`, in its forward pass
    full    for `steps` steps no file of this rank can grow, as if every disk were full (RLIMIT_FSIZE)
    flip    a bit of a gradient, after the ranks exchanged them
    wrong   a bit of what this rank brings to the sum of gradients; `times` times on end, on one `node` or on any
    nan     the batch of one step, computed once or (with "stays") whenever that step comes
    flipped, truncated, missing   the newest state on disk is damaged, this node's memory is lost, and the rank dies
"""

import ctypes
import dataclasses
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from puna.artifacts import WORK
from puna.train.resilience.peers import node_name

FOLDER, PLAN, DONE = "faults", "plan.json", "injected.jsonl"  # in the run's folder: its scratch may be full on purpose
PLANNED = (
    "kill",
    "stop",
    "hang",
    "raise",
    "abort",
    "oom",
    "slow",
    "full",
    "flip",
    "wrong",
    "nan",
    "flipped",
    "truncated",
    "missing",
)

_plan: list[dict[str, Any]] = []
_past: set[int] = set()  # batches that were spoilt: by this process, or before it was started
_now = -1  # the step that is being made
_folder = Path()


def plan(out: Path, faults: list[dict[str, Any]]) -> None:
    """Write the plan of a run that is not begun yet."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    (out / FOLDER / PLAN).write_text(json.dumps([{"id": number, **fault} for number, fault in enumerate(faults)]))


def prepare(out: Path) -> None:
    """Read the plan, in each rank. A run without one is left alone."""
    global _plan, _folder
    _folder = out / FOLDER
    path = _folder / PLAN
    _plan = json.loads(path.read_text()) if path.is_file() else []
    _past.update(fault["id"] for fault in _plan if _marked(fault))


def planned(
    out: Path, parts: Sequence[torch.nn.Module], brought: Any = None, loader: Any = None
) -> Callable[[int, str], None] | None:
    """What a guard is to call at each beat of a run with a plan; None for one without.

    `brought` (puna/parallel/brought.py) is where gradients can be spoilt before their sum, `loader` where batches can.
    """
    prepare(out)
    if any(_is_mine(fault, "wrong") for fault in _plan):
        brought.meddle = spoil_gradients
    if loader is not None and any(fault["kind"] == "nan" for fault in _plan):
        _data_rank[:] = [loader.rank]
        loader.step = _spoiling(loader.step)
    model = torch.nn.ModuleList(parts)
    if any(_is_mine(fault, "slow") for fault in _plan):
        slow_down(model)
    return (lambda step, phase: at(step, phase, model)) if _plan else None


def slow_down(model: torch.nn.Module) -> None:
    """Let a forward take longer in the steps for which that is planned: a bit in each layer, between the exchanges."""
    leaves = [module for module in model.modules() if next(module.children(), None) is None]

    def rest(*_: Any) -> None:
        for fault in _plan:
            if _is_mine(fault, "slow") and fault["step"] <= _now < fault["step"] + fault.get("steps", 1 << 30):
                if not _marked(fault):
                    _mark(fault)
                time.sleep(fault["seconds"] / len(leaves))

    for leaf in leaves:
        leaf.register_forward_pre_hook(rest)


def _is_mine(fault: dict[str, Any], kind: str) -> bool:
    return fault["kind"] == kind and fault["rank"] == int(os.environ.get("RANK", "0"))


def happened(out: Path) -> list[dict[str, Any]]:
    """The faults that came, each with the time `at` (monotonic seconds) and `wall`."""
    path = out / FOLDER / DONE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def at(step: int, phase: str, model: torch.nn.Module) -> None:
    """Called by a rank in `phase` of `step`: `backward` before its forward, `update` when gradients are exchanged."""
    global _now
    _now, rank = step, int(os.environ.get("RANK", "0"))
    if phase == "backward":
        _spoil_batches(step)
    if _full_until and step >= min(_full_until):
        _full_until.clear()
        limit_files(resource.RLIM_INFINITY)
    for fault in _plan:
        if _is_due(fault, step, rank) and phase == fault.get("phase", _phase(fault["kind"])):
            _mark(fault)
            _do(fault, model)


def spoil(step: int, batch: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """The step's batch, or NaN if that is planned for this rank, or the data rank `rank`: all ranks that share it."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    for fault in _plan:
        if fault["kind"] != "nan" or fault["rank"] != rank or fault["step"] != step:
            continue
        if fault.get("stays") or fault["id"] not in _past:
            _past.add(fault["id"])
            if not _marked(fault):
                _mark(fault)
            return torch.full_like(batch, float("nan"))
    return batch


_full_until: list[int] = []  # the step from which files can grow again
_data_rank: list[int] = []
_batches: list[Any] = []  # of the real loop's step
_healthy: list[tuple[torch.Tensor, torch.Tensor]] = []  # what was spoilt, and what it was


def _spoiling(make: Callable[..., Any]) -> Callable[..., Any]:
    """A loader's `step`, which remembers its batches."""

    def step(*arguments: Any) -> Any:
        _numbers, _batches[:] = made = make(*arguments)
        return made

    return step


def _spoil_batches(step: int) -> None:
    """The real loop's batches get NaN where that is planned; what it computes once more is as it was."""
    while _healthy:
        tensor, before = _healthy.pop()
        tensor.copy_(before)
    found = [tensor for batch in _batches for tensor in _weights(batch)][:1]
    for tensor in found:
        spoilt = spoil(step, tensor, *_data_rank)
        if spoilt is not tensor:
            _healthy.append((tensor, tensor.clone()))
            tensor.copy_(spoilt)


def _weights(batch: Any) -> Iterator[torch.Tensor]:
    """A batch's floating-point tensors: how much each of its predictions counts."""
    for value in vars(batch).values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif dataclasses.is_dataclass(value):
            yield from _weights(value)


_left: dict[int, int] = {}  # fault -> how many times it still comes


def spoil_gradients(gradients: torch.Tensor) -> None:
    """Flip a bit of what this rank brings to a sum, if that is planned for now."""
    for fault in _plan:
        if not _is_mine(fault, "wrong") or _now < fault["step"] or fault.get("node", node_name()) != node_name():
            continue
        if fault["id"] not in _left:
            _left[fault["id"]] = 0 if _marked(fault) and "node" not in fault else fault.get("times", 1)
            if not _marked(fault):
                _mark(fault)
        if _left[fault["id"]] > 0:
            _left[fault["id"]] -= 1
            flip_bit(gradients, random.Random(f"{fault['id']} {_left[fault['id']]}"))


def _phase(kind: str) -> str:
    return "update" if kind == "flip" else "backward"


def _is_due(fault: dict[str, Any], step: int, rank: int) -> bool:
    return (
        fault["kind"] not in ("slow", "nan", "wrong")
        and fault["rank"] == rank
        and fault["step"] == step
        and not _marked(fault)
    )


def _marked(fault: dict[str, Any]) -> bool:
    return (_folder / f"injected-{fault['id']}").exists()


def _mark(fault: dict[str, Any]) -> None:
    (_folder / f"injected-{fault['id']}").touch()
    note(_folder, fault)


def note(folder: Path, fault: dict[str, Any]) -> None:
    """Write down that a fault came."""
    with (folder / DONE).open("a") as file:
        file.write(json.dumps({**fault, "at": time.monotonic(), "wall": time.time()}) + "\n")


def _do(fault: dict[str, Any], model: torch.nn.Module) -> None:
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "hang":
        hang()
    elif kind == "raise":
        raise RuntimeError("an exception, on purpose")
    elif kind == "abort":
        os.abort()
    elif kind == "oom":
        exhaust_memory()
    elif kind == "full":
        _full_until.append(fault["step"] + fault.get("steps", 10))
        limit_files(0)
    elif kind == "flip":
        flip_gradient(model, random.Random(fault["id"]))
    elif kind in ("flipped", "truncated", "missing"):
        damage_newest(_folder.parent / WORK, kind, random.Random(fault["id"]))
        lose_memory(Path(os.environ["PUNA_MEMORY"]))
        os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Wait for what never comes, with the heart beating on."""
    while True:
        time.sleep(3600)


def limit_files(most_bytes: int) -> None:
    """From now on no file of this process grows beyond `most_bytes`: what is written after that is an `OSError`."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard if most_bytes == resource.RLIM_INFINITY else most_bytes, hard))


def exhaust_memory() -> None:
    """Take memory until the kernel kills this process, as it does when a cgroup's memory is spent.

    Where no cgroup can be made, a limit of the address space makes the allocation fail instead, which is an exception.
    """
    if not _confine_memory(256 << 20):
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    hoard = []
    while True:
        hoard.append(torch.ones(8 << 20))


def _confine_memory(most_bytes: int) -> bool:
    """Put this process into a cgroup with so much memory; False where that is not allowed."""
    for base, limit in (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")):
        try:
            group = Path(base) / f"puna-{os.getpid()}"
            if (Path(base) / "cgroup.procs").exists():
                group.mkdir()
                (group / limit).write_text(str(most_bytes))
                (group / "cgroup.procs").write_text(str(os.getpid()))
                return True
        except OSError:
            continue
    return False


def flip_gradient(model: torch.nn.Module, draw: random.Random) -> None:
    """Flip one bit of one gradient."""
    found = [p.grad for p in model.parameters() if p.grad is not None]
    local = [g.to_local() if hasattr(g, "to_local") else g for g in found]
    flip_bit(draw.choice([g for g in local if g.numel()]), draw, highest=31)


def flip_bit(numbers: torch.Tensor, draw: random.Random, *, highest: int = 23) -> None:
    """Flip a bit of a float32, below `highest`: of the mantissa, unless told otherwise."""
    bits = numbers.view(-1).view(torch.int32)
    bits[draw.randrange(bits.numel())] ^= 1 << draw.randrange(8, highest)  # a bit that the update does not round away


def flip_file_bit(path: Path, draw: random.Random) -> int:
    """Flip one bit of a file; its number."""
    bit = draw.randrange(path.stat().st_size * 8)
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))
    return bit


def truncate_file(path: Path, draw: random.Random) -> None:
    """Cut a file somewhere."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def damage_newest(work: Path, kind: str, draw: random.Random) -> None:
    """Flip a bit of a part of the newest state in `work`, cut it short, or remove it."""
    part = sorted(work.glob("state-*/state.json"))[-1].parent / "part-0000.safetensors"
    if kind == "flipped":
        flip_file_bit(part, draw)
    elif kind == "truncated":
        truncate_file(part, draw)
    else:
        part.unlink()


def lose_memory(root: Path) -> None:
    """All states in shared memory are gone, as after a power failure."""
    for seal in root.glob("*/*/replica-*/*.seal"):
        seal.unlink(missing_ok=True)


def hold_the_interpreter(seconds: float) -> None:
    """Keep Python's lock in C code: no thread of this process runs, not even its heart."""
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
