"""Pretraining: predict every next token; documents do not attend across their borders (arXiv 2407.21783, 3.2)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from puna.artifacts import Artifact
from puna.config import require
from puna.tokenizer.shards import TokenShards
from puna.train.objectives.rows import Rows, next_token_loss


@dataclass(frozen=True, kw_only=True)
class LmObjective:
    """What one step of pretraining is made of."""

    sequence_length: int = 256  # tokens
    rows: int = 16  # sequences per step
    validation_rows: int = 64  # held-out sequences that are scored in the loop

    def __post_init__(self) -> None:
        require(self.sequence_length >= 8, f"sequence_length={self.sequence_length} is too short (8 at least)")

    def data(self, artifact: Artifact, _tokenizer: Path, seed: int) -> "LmData":
        return LmData(self, artifact, seed)


class LmData:
    """Batches of a token shard, addressed by the step: nothing to save, nothing to restore."""

    loss = staticmethod(next_token_loss)

    def __init__(self, config: LmObjective, artifact: Artifact, seed: int):
        self.config = config
        self.train = TokenShards.load(artifact, "train")
        self.heldout = TokenShards.load(artifact, "heldout")
        self.seed = seed
        samples = self.train.samples(config.sequence_length)
        self.notes = {"epoch_steps": samples / config.rows, "train_tokens": self.train.tokens}

    def batch(self, step: int) -> Rows:
        T, first = self.config.sequence_length, step * self.config.rows
        return _rows([self.train.shuffled(i, T, self.seed) for i in range(first, first + self.config.rows)])

    def validation(self) -> list[Rows]:
        T, size = self.config.sequence_length, self.config.rows
        count = min(self.config.validation_rows, self.heldout.samples(T))
        groups = [range(i, min(i + size, count)) for i in range(0, count, size)]
        return [_rows([self.heldout.sample(i, T) for i in group]) for group in groups]


def _rows(samples: list[tuple[np.ndarray, np.ndarray]]) -> Rows:
    tokens = torch.from_numpy(np.stack([t for t, _ in samples]))
    documents = torch.from_numpy(np.stack([d for _, d in samples]))
    # The first token of a document is not predicted from the one before it: that belongs to another document.
    same = documents[:, 1:] == documents[:, :-1]
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=same.float())
