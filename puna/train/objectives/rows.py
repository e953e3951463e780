"""Packed rows of tokens, and the two things that objectives do with them: a loss, or log-probabilities per sequence."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from puna.kernels.cross_entropy import cross_entropy, token_log_probs
from puna.model.llama import Llama, WithinDocuments


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

    @functools.cached_property
    def weight(self) -> float:
        """The predictions that count, by their weights."""
        return self.weights.sum().item()

    def to(self, device: torch.device) -> "Rows":
        """The same rows on `device`."""
        return move(self, device)


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors, and the batches within it, on `device`; itself if they are there."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    moved = {name: value.to(device) for name, value in fields.items() if hasattr(value, "to")}
    return batch if all(moved[name] is fields[name] for name in moved) else dataclasses.replace(batch, **moved)


@dataclass(frozen=True, kw_only=True)
class PairedRows:
    """A batch of P pairs: the chosen side of each in `rows`, then the rejected ones."""

    rows: Rows  # (2P, T)

    @property
    def shape(self) -> tuple[int, int]:
        """(2P, T)."""
        return self.rows.shape

    @property
    def weight(self) -> float:
        """The pairs."""
        return self.shape[0] / 2

    def to(self, device: torch.device) -> Self:
        """The same pairs on `device`."""
        return move(self, device)


def hidden_states(model: Llama, rows: Rows) -> Tensor:
    """The last hidden states of all tokens, (B, T, D)."""
    return model.hidden(rows.tokens, rows.positions, WithinDocuments(rows.documents))


def next_token_loss(model: Llama, rows: Rows) -> tuple[Tensor, dict[str, float]]:
    """The mean loss in nats over the targets that count, and what to log beside it."""
    hidden = hidden_states(model, rows).flatten(0, 1)
    weights = rows.weights.flatten()
    total = cross_entropy(hidden, model.output.weight, rows.targets.flatten(), weights)
    return total / weights.sum(), {}


def weighted_log_probs(model: Llama, rows: Rows, weights: Tensor) -> Tensor:
    """Sum over each row of weight * log p(target), for rows that hold one sequence each.

    `weights` (W, B, T) are W different weightings of the same tokens; the result is (W, B), from one pass.
    """
    hidden = hidden_states(model, rows).flatten(0, 1)
    flat = weights.flatten(1)
    counted = flat.sum(0).nonzero()[:, 0]
    log_probs = token_log_probs(hidden[counted], model.output.weight, rows.targets.flatten()[counted])
    spread = torch.zeros_like(flat).index_copy(1, counted, log_probs * flat[:, counted])
    return spread.view(weights.shape).sum(-1)


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
