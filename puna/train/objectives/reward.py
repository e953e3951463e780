"""The reward model: a Llama with one number per dialog instead of a vocabulary (arXiv 2407.21783, 4.1.2).

    loss = -log sigmoid(r(chosen) - r(rejected))        Bradley-Terry, without a margin

The number is read at the dialog's last token, whatever the padding or the batch around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.artifacts import Artifact
from puna.model.llama import Llama
from puna.tokenizer import load_tokenizer
from puna.train.objectives.dpo import DpoData, DpoObjective, Side, load_pairs, pair_course
from puna.train.objectives.rows import PairedRows, Rows, hidden_states, pad
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


class RewardModel(nn.Module):
    """A Llama's body and a linear head."""

    def __init__(self, llama: Llama):
        super().__init__()
        self.llama = llama
        self.head = nn.Linear(llama.config.dim, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def config(self):
        return self.llama.config

    def forward(self, rows: Rows, last: Tensor) -> Tensor:
        """The reward of each row, (B,), read at place `last` (B,)."""
        hidden = hidden_states(self.llama, rows)
        return self.head(hidden[torch.arange(len(last), device=last.device), last])[:, 0].float()


@dataclass(frozen=True, kw_only=True)
class RewardRows(PairedRows):
    """Pairs of dialogs, one a row, and the place of each one's last token."""

    last: Tensor  # (2P,)


def dialog_rows(sequences: list[list[int]]) -> tuple[Rows, Tensor]:
    """Rows for `RewardModel`: one dialog each, and the place of its last token."""
    rows = pad([([*ids, 0], [0.0] * (len(ids) + 1)) for ids in sequences], fill=0)
    return rows, torch.tensor([len(ids) - 1 for ids in sequences])


class RewardData(DpoData):
    """Batches of pairs; no reference is needed."""

    def __init__(self, config: RewardObjective, pairs: list[tuple[Side, Side]], seed: int):
        super().__init__(DpoObjective(sequence_length=config.sequence_length, pairs=config.pairs), pairs, seed)

    def prepare(self, model: nn.Module) -> None:
        """Nothing to prepare."""

    def batch(self, numbers: Sequence[int], at: Position | None = None) -> RewardRows:
        pairs = [self.pairs[i] for i in self._indices(numbers)]
        rows, last = dialog_rows([c.ids for c, _ in pairs] + [r.ids for _, r in pairs])
        return RewardRows(rows=rows, last=last)

    def loss(self, model: RewardModel, batch: RewardRows) -> tuple[Tensor, dict[str, float]]:
        """The loss above and the share of pairs ranked right."""
        chosen, rejected = model(batch.rows, batch.last).chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        return loss, {"ranked_right": (chosen > rejected).float().mean().item()}
