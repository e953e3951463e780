"""One run in several processes: those that `torchrun` starts find each other, train together, and one writes the result.

`torchrun --nproc-per-node 4 -m puna pretrain … --layout tensor=2 shard=2` starts four of the same command. Each knows
its number from the environment. Started without `torchrun` there is one process, which starts others where a layout asks
for them (`train_laid_out`).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from puna import artifacts, log
from puna.artifacts import Artifact
from puna.train.loop import train
from puna.train.resilience.peers import meet
from puna.train.resilience.ranks import train_watched
from puna.train.settings import TrainConfig


def first() -> bool:
    """Whether this process is the one that speaks to the user."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def joined(config: TrainConfig) -> Iterator[None]:
    """The processes of a run as one group. Raises `ConfigError` if they are not as many as the layout says."""
    config.layout.check_world(int(os.environ.get("WORLD_SIZE", 1)))
    if config.layout.world == 1:
        yield
        return
    if not first():
        log.hush()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    meet("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def train_together(
    config: TrainConfig, data: Artifact | list[Artifact], tokenizer: Artifact, base: Artifact | None, *, out: Path
) -> Artifact:
    """The stage `train`, in all processes of `config.layout`. The first one writes, and all return what it wrote."""
    with joined(config):
        if config.layout.world == 1:
            return train(config, data, tokenizer, base, out=out)
        complete = (out / artifacts.MANIFEST).exists()
        dist.barrier()  # all have looked before one changes anything
        if first() or complete:
            made = train(config, data, tokenizer, base, out=out)
        else:
            train.__wrapped__(config, data, tokenizer, base, out=out)
        dist.barrier()
        return made if first() or complete else artifacts.load(out, "checkpoint")


def train_laid_out(
    config: TrainConfig, data: Artifact | list[Artifact], tokenizer: Artifact, base: Artifact | None, *, out: Path
) -> Artifact:
    """The stage `train`, in as many processes as `config.layout` has: what recipes and rounds call.

    They are this one, those that torchrun has started, or else ones that are started here and watched.
    """
    started = config.layout.world == 1 or "WORLD_SIZE" in os.environ
    run = train_together if started else train_watched
    return run(config, data, tokenizer, base, out=out)
