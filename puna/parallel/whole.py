"""One process that holds the whole model: no communication, and the fastest a single machine has."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from puna.parallel.brought import Brought
from puna.parallel.placement import Batch, Cut, Objective


def products_in_bf16(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16, sums and weights in float32."""
    return torch.autocast(device.type, torch.bfloat16)


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
        whole = sum(batch.weight for batch in batches)
        losses, notes = [], {}
        for batch in batches:
            share = batch.weight / whole
            with products_in_bf16(self.device):
                loss, said = data.loss(self.model, batch.to(self.device))
            (loss * share).backward()
            losses.append(loss.detach() * share)
            for name, value in said.items():
                notes[name] = notes.get(name, 0.0) + value * share
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
        with products_in_bf16(self.device):
            losses = [(data.loss(self.model, b.to(self.device))[0].item(), b.weight) for b in batches]
        return sum(loss * weight for loss, weight in losses) / sum(weight for _, weight in losses)

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
