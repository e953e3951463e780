"""The real loop on several layouts, in forked processes: what `test_layouts.py` starts and reads.

A process of its own, because only one that has not computed yet may be forked. Products are in float32, so that what
differs between layouts is the order of sums. Prints one JSON object.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing
from train_world import TOY

from puna import artifacts
from puna.parallel import sharded, whole
from puna.parallel.layout import Layout
from puna.train import guard
from puna.train.guard import PlainGuard
from puna.train.objectives.dpo import DpoObjective
from puna.train.objectives.lm import LmObjective
from puna.train.objectives.reward import RewardObjective
from puna.train.optimizers import OptimizerConfig
from puna.train.processes import train_together
from puna.train.schedule import Schedule
from puna.train.settings import TrainConfig

CONFIG = TrainConfig(
    lm=LmObjective(sequence_length=32, rows=8, validation_rows=8),
    model=dataclasses.replace(TOY, n_layers=4),
    steps=8,
    schedule=Schedule(peak=3e-3, warmup_steps=3, averaged=2),
    save_every_steps=4,
    validate_every_steps=4,
    threads=1,
)
CONFIGS = {
    "lm": CONFIG,
    "muon": dataclasses.replace(CONFIG, optimizer=OptimizerConfig(kind="muon")),
    "dpo": dataclasses.replace(CONFIG, lm=None, dpo=DpoObjective(sequence_length=96, pairs=8)),
    "reward": dataclasses.replace(CONFIG, lm=None, reward=RewardObjective(sequence_length=96, pairs=8)),
}
STOP = 4  # steps after which a run is broken off


class BreakingOff(PlainGuard):
    """A guard that is told to stop, in one of its processes only, during step `STOP`."""

    def after_step(self, run):
        if run.position.step == STOP and run.placement.rank == run.placement.world - 1:
            self._received.append(15)
        super().after_step(run)


def child(rank: int, port: int, kind: str, layout: Layout, world: Path, out: Path, stops: bool) -> None:
    """One process of a run."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(layout.world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    whole.products_in_bf16 = lambda _device: contextlib.nullcontext()
    sharded.place.__kwdefaults__["dtype"] = torch.float32
    if stops:
        guard.PlainGuard = BreakingOff
    config = dataclasses.replace(CONFIGS[kind], layout=layout)
    data = artifacts.load(world / ("tokens" if config.lm else "preferences"))
    tokenizer = artifacts.load(world / "tokenizer")
    with contextlib.suppress(KeyboardInterrupt):
        train_together(config, data, tokenizer, None, out=out)


def run(kind: str, layout: Layout, world: Path, out: Path, stops: bool = False) -> None:
    """A run in as many processes as the layout has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    arguments = [(rank, port, kind, layout, world, out, stops) for rank in range(layout.world)]
    children = [context.Process(target=child, args=given) for given in arguments]
    for process in children:
        process.start()
    for process in children:
        process.join()
    if any(process.exitcode for process in children):
        raise SystemExit(f"{layout}: processes ended with {[process.exitcode for process in children]}")


def losses(out: Path) -> list[float]:
    """A complete run's loss at each step, and its validation losses."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines] + [line["val_loss"] for line in lines if "val_loss" in line]


def main() -> None:
    world, out, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4] if len(sys.argv) > 4 else "lm"
    run(kind, Layout(), world, out / "whole")
    found = {"whole": losses(out / "whole"), "samples": {}, "weights": {}}
    for name, parts in json.loads(sys.argv[3]).items():
        layouts = [Layout(**part) for part in parts]
        for layout in layouts[:-1]:
            run(kind, layout, world, out / name, stops=True)
        run(kind, layouts[-1], world, out / name)
        found[name] = losses(out / name)
    for folder in out.iterdir():
        found["samples"][folder.name] = json.loads((folder / "samples.json").read_text())["content"]
        files = sorted(folder.glob("*.safetensors"))
        found["weights"][folder.name] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
