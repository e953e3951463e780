"""Token shards of several sources as one endless, numbered sequence of samples.

Which source? Shares are given in 1/1024: a cycle of 1,024 places, dealt out by largest remainder and shuffled once by
the seed. So how many samples of a source lie before any number is a table look-up, and shares hold over every cycle.

Which sample of it? Each source is read in its own shuffled order, an epoch at a time. When a later phase reads the same
source in longer samples, nothing may come twice: the order is therefore one of *blocks*, as long as the run's longest
samples. Shorter samples are pieces of blocks, and so that neighbours do not fill a batch, `WINDOW` blocks are open at a
time and give a piece each in turn:

    sample i of length T, blocks of r T   ->   window i // (W r), block  w W + (i % W r) % W,  piece (i % W r) // W

Where the length changes, reading goes on at the next whole window; what was left of the last one is passed over.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from puna.artifacts import Artifact
from puna.config import require
from puna.errors import DataError
from puna.tokenizer.shards import TokenShards, permuted

CYCLE = 1024
WINDOW = 64  # blocks


class Source:
    """One split of a tokens artifact, in samples of any length that divides `block` tokens."""

    def __init__(self, shards: TokenShards, block: int, seed: int):
        self.shards, self.block, self.seed = shards, block, seed
        self.blocks = shards.samples(block)
        if not self.blocks:
            hint = "give more text, or set a shorter sequence length"
            raise DataError(f"{shards.tokens:,} tokens do not make one sample of {block}", hint=hint)

    def sample(self, place: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample at `place` of the endless order for samples of `length`: ids and documents, `length + 1` each."""
        pieces = self.block // length
        window, within = divmod(place, WINDOW * pieces)
        piece, column = divmod(within, WINDOW)
        epoch, block = divmod(window * WINDOW + column, self.blocks)
        chosen = permuted(block, self.blocks, f"{self.seed}/{epoch}")
        return self.shards.sample(chosen * pieces + piece, length)

    def resume(self, samples: int, length: int, new_length: int) -> int:
        """The place to go on at in samples of `new_length`, after `samples` of `length`."""
        if length == new_length or not samples:
            return samples
        windows = -(-samples * length // (WINDOW * self.block))
        return windows * WINDOW * (self.block // new_length)


class Deal:
    """Which source each sample of a phase comes from, by shares."""

    def __init__(self, shares: Mapping[str, float], seed: int):
        total = sum(shares.values())
        exact = {name: CYCLE * share / total for name, share in shares.items()}
        quota = {name: int(value) for name, value in exact.items()}
        by_remainder = sorted(exact, key=lambda name: (quota[name] - exact[name], name))
        for name in by_remainder[: CYCLE - sum(quota.values())]:
            quota[name] += 1
        self.names = [name for name in shares if quota[name]]
        places = np.repeat(np.arange(len(self.names)), [quota[name] for name in self.names])
        self._of = np.random.default_rng(seed).permutation(places)
        ones = self._of[None, :] == np.arange(len(self.names))[:, None]
        self._before = np.concatenate([np.zeros((len(self.names), 1), int), ones.cumsum(1)], 1)  # (sources, CYCLE + 1)

    def source(self, number: int) -> tuple[str, int]:
        """The source of the phase's sample `number`, and how many of it came before."""
        which = int(self._of[number % CYCLE])
        return self.names[which], self._count(which, number)

    def counts(self, number: int) -> dict[str, int]:
        """How many samples of each source the first `number` samples hold."""
        return {name: self._count(which, number) for which, name in enumerate(self.names)}

    def _count(self, which: int, number: int) -> int:
        cycles, rest = divmod(number, CYCLE)
        return int(cycles * self._before[which, CYCLE] + self._before[which, rest])


def open_sources(artifacts: Sequence[Artifact], block: int, seed: int) -> dict[str, Source]:
    """The training split of each artifact, under its folder's name (a single one is called `data`)."""
    if len(artifacts) == 1:
        return {"data": Source(TokenShards.load(artifacts[0], "train"), block, seed)}
    names = [Path(artifact.path).name for artifact in artifacts]
    hint = "sources are called after their folders: rename one"
    require(len(set(names)) == len(names), f"two sources have the same name: {names}", hint=hint)
    return {n: Source(TokenShards.load(a, "train"), block, seed) for n, a in zip(names, artifacts, strict=True)}
