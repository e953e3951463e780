"""Packed rows of tokens, alone or in pairs, and what is learnt of rows whose targets count by their weights."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from puna.parallel.placement import Placement, Reading


@dataclass(frozen=True, kw_only=True)
class Rows:
    """B rows of T tokens. `documents` numbers the document of each token within its row; attention stays inside one.

    `weights` (B, T) float32 says how much the prediction of `targets` at each place counts; 0 for what is not learnt.
    """

    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64
    documents: Tensor  # (B, T) int64
    weights: Tensor  # (B, T) float32

    @property
    def positions(self) -> Tensor:
        """(B, T): each document starts at position 0, wherever it lies in its row."""
        B, T = self.documents.shape
        index = torch.arange(T, device=self.documents.device).expand(B, T)
        starts = torch.ones(B, T, dtype=torch.bool, device=self.documents.device)
        starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return index - torch.where(starts, index, 0).cummax(dim=1).values

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return tuple(self.tokens.shape)

    @property
    def weight(self) -> float:
        """The predictions that count, by their weights."""
        return self.weights.sum().item()

    @property
    def rows(self) -> "Rows":
        """These."""
        return self

    @property
    def counts(self) -> tuple[float]:
        """The predictions."""
        return (self.weight,)

    @property
    def samples(self) -> int:
        """Rows."""
        return len(self.tokens)

    def take(self, which: slice) -> "Rows":
        """Some of the rows."""
        return pick(self, torch.arange(self.samples)[which])

    def to(self, device: torch.device) -> "Rows":
        """The same rows on `device`."""
        return move(self, device)


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors, and the batches within it, on `device`; itself if they are there."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved = {name: value.to(device) for name, value in fields.items() if hasattr(value, "to")}
    return batch if all(moved[name] is fields[name] for name in moved) else dataclasses.replace(batch, **moved)


def pick(batch: Any, rows: Tensor) -> Any:
    """Some rows of a batch, of all its tensors and of the batches within it."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    picked = {name: value[rows] if isinstance(value, Tensor) else pick(value, rows) for name, value in fields.items()}
    return dataclasses.replace(batch, **picked)


@dataclass(frozen=True, kw_only=True)
class PairedRows:
    """A batch of P pairs: the chosen side of each in `rows`, then the rejected ones."""

    rows: Rows  # (2P, T)

    @property
    def shape(self) -> tuple[int, int]:
        """(2P, T)."""
        return self.rows.shape

    @property
    def counts(self) -> tuple[float, ...]:
        """The pairs."""
        return (float(self.samples),)

    @property
    def samples(self) -> int:
        """Pairs."""
        return self.shape[0] // 2

    def take(self, which: slice) -> Self:
        """Some of the pairs."""
        chosen = torch.arange(self.samples)[which]
        return pick(self, torch.cat((chosen, chosen + self.samples)))

    def to(self, device: torch.device) -> Self:
        """The same pairs on `device`."""
        return move(self, device)


def next_token_loss(reading: Reading, _rows: Rows, totals: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """A share of the mean loss in nats over the targets that count."""
    return reading.token_losses() / totals[0], {}


class NextTokens:
    """An objective that learns targets by their weights, and nothing else."""

    noted: tuple[str, ...] = ()
    loss = staticmethod(next_token_loss)

    def prepare(self, placement: Placement) -> None:
        """Nothing to prepare."""


def pad(sequences: list[tuple[list[int], list[float]]], fill: int) -> Rows:
    """One sequence per row: (ids, weight of *predicting* each id); shorter ones are filled up on the right."""
    longest = max(len(ids) for ids, _ in sequences)
    B = len(sequences)
    tokens = torch.full((B, longest), fill)
    weights = torch.zeros(B, longest)
    documents = torch.ones(B, longest, dtype=torch.int64)  # 1: the filling
    for row, (ids, weight) in enumerate(sequences):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(weight)
        documents[row, : len(ids)] = 0
    return Rows(tokens=tokens[:, :-1], targets=tokens[:, 1:], documents=documents[:, :-1], weights=weights[:, 1:])
