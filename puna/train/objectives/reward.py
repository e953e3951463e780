"""Reward modelling: one number per dialog, learnt from pairs (arXiv 2407.21783, 4.1.2; the model is `model/reward.py`).

    loss = -log sigmoid(r(chosen) - r(rejected))        Bradley-Terry, without a margin

The number is read at the dialog's last token, whatever the padding or the batch around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.artifacts import Artifact
from puna.parallel.placement import Placement, Reading
from puna.tokenizer import load_tokenizer
from puna.train.objectives.dpo import DpoData, DpoObjective, Side, load_pairs, pair_course
from puna.train.objectives.rows import PairedRows, Rows, pad
from puna.train.phases import Phase, Position


@dataclass(frozen=True, kw_only=True)
class RewardObjective:
    """What one step of reward training is made of. The artifact must hold `preferences.jsonl`."""

    sequence_length: int = 384  # tokens
    pairs: int = 16  # per step

    def course(self, steps: int) -> tuple[Phase, ...]:
        """One phase of `steps` steps."""
        return pair_course(self, steps)

    def data(self, artifacts: Sequence[Artifact], tokenizer: Path, seed: int) -> "RewardData":
        return RewardData(self, load_pairs(artifacts, load_tokenizer(tokenizer)), seed)


@dataclass(frozen=True, kw_only=True)
class RewardRows(PairedRows):
    """Pairs of dialogs, one a row, and the place of each one's last token."""

    last: Tensor  # (2P,)


def dialog_rows(sequences: list[list[int]]) -> tuple[Rows, Tensor]:
    """Rows for a reward model: one dialog each, and the place of its last token."""
    rows = pad([([*ids, 0], [0.0] * (len(ids) + 1)) for ids in sequences], fill=0)
    return rows, torch.tensor([len(ids) - 1 for ids in sequences])


class RewardData(DpoData):
    """Batches of pairs; no reference is needed."""

    noted = ("ranked_right",)

    def __init__(self, config: RewardObjective, pairs: list[tuple[Side, Side]], seed: int):
        super().__init__(DpoObjective(sequence_length=config.sequence_length, pairs=config.pairs), pairs, seed)

    def prepare(self, placement: Placement) -> None:
        """Nothing to prepare."""

    def batch(self, numbers: Sequence[int], at: Position | None = None) -> RewardRows:
        pairs = [self.pairs[i] for i in self._indices(numbers)]
        rows, last = dialog_rows([c.ids for c, _ in pairs] + [r.ids for _, r in pairs])
        return RewardRows(rows=rows, last=last)

    def loss(self, reading: Reading, batch: RewardRows, totals: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """A share of the loss above and of the pairs ranked right."""
        chosen, rejected = reading.rewards(batch.last).chunk(2)
        loss = -F.logsigmoid(chosen - rejected).sum() / totals[0]
        return loss, {"ranked_right": (chosen > rejected).float().sum() / totals[0]}
