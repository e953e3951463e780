"""One process that holds the whole model: no communication, and the fastest a single machine has."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from puna.kernels.cross_entropy import cross_entropy, token_log_probs
from puna.model.llama import WithinDocuments
from puna.model.reward import RewardModel
from puna.parallel.brought import Brought
from puna.parallel.placement import Ask, Batch, Cut, Objective


def products_in_bf16(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16, sums and weights in float32."""
    return torch.autocast(device.type, torch.bfloat16)


class WholeReading:
    """What a Llama, or a reward model, says of `rows`, which hold tokens, targets, positions, documents and weights."""

    def __init__(self, model: nn.Module, rows: Any):
        self.model, self.rows = model, rows
        llama = model.llama if isinstance(model, RewardModel) else model
        self.output = llama.output.weight
        self.hidden = llama.hidden(rows.tokens, rows.positions, WithinDocuments(rows.documents))  # (B, T, D)

    def token_losses(self) -> Tensor:
        """The weighted sum of the targets' losses, in nats."""
        targets, weights = self.rows.targets.flatten(), self.rows.weights.flatten()
        return cross_entropy(self.hidden.flatten(0, 1), self.output, targets, weights)

    def log_probs(self, weights: Tensor) -> Tensor:
        """(W, B) from (W, B, T), in one pass."""
        hidden, targets = self.hidden.flatten(0, 1), self.rows.targets.flatten()
        return row_sums(weights, lambda counted: token_log_probs(hidden[counted], self.output, targets[counted]))

    def rewards(self, places: Tensor) -> Tensor:
        """(B,) float32."""
        at = torch.arange(len(places), device=places.device)
        return self.model.head(self.hidden[at, places])[:, 0].float()


def row_sums(weights: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over each row of weight * value, (W, B) from (W, B, T). `values` gives those of the tokens that count, by index."""
    flat = weights.flatten(1)
    counted = flat.sum(0).nonzero()[:, 0]
    spread = torch.zeros_like(flat).index_copy(1, counted, values(counted) * flat[:, counted])
    return spread.view(weights.shape).sum(-1)


class Whole:
    """A `Placement` of one rank."""

    rank = data_rank = 0
    world = data_ranks = 1

    def __init__(self, model: nn.Module, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.parts = [self.model]
        self.brought = Brought()
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def backward(self, data: Objective, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        self.brought.begin()
        self.model.zero_grad()
        losses, notes = [], {}
        for loss, said in self._losses(data, batches):
            loss.backward()
            losses.append(loss.detach())
            for name, value in said.items():
                notes[name] = notes.get(name, 0.0) + float(value)
        if self.brought.watched or self.brought.meddle:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    self.brought.bring(parameter.grad)
        return torch.stack(losses).sum().item(), notes

    def clip(self, most: float) -> float:
        return nn.utils.clip_grad_norm_(self.model.parameters(), most).item()

    def updated(self) -> None:
        """Nothing is computed from the parameters."""

    @torch.no_grad()
    def validate(self, data: Objective, batches: Sequence[Batch]) -> float:
        return sum(loss.item() for loss, _ in self._losses(data, batches))

    @torch.no_grad()
    def read(self, ask: Ask, count: int, batch: Callable[[int], Batch]) -> list[Tensor]:
        with products_in_bf16(self.device):
            batches = (batch(number).to(self.device) for number in range(count))
            return [ask(WholeReading(self.model, given.rows), given).cpu() for given in batches]

    def _losses(self, data: Objective, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        totals = tuple(map(sum, zip(*(batch.counts for batch in batches), strict=True)))
        for batch in batches:
            with products_in_bf16(self.device):
                batch = batch.to(self.device)
                made = data.loss(WholeReading(self.model, batch.rows), batch, totals)
            yield made

    def whole(self) -> nn.Module:
        return self.model

    def join(self, named: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """They are whole."""
        return named

    def part(self, _name: str, given: Tensor) -> Tensor:
        """All of it."""
        return given

    def pieces(self, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Cut]:
        """Nothing is cut."""
        return dict(named), {}

    def change_wholes(
        self, pieces: Iterable[tuple[str, Tensor]], change: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """They are whole."""
        return ((name, change(piece)) for name, piece in pieces)

    def most(self, value: int) -> int:
        """There is one rank, and this is its."""
        return value
