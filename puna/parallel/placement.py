"""Where a model's parts are: all that the training loop sees of parallelism.

The loop knows the samples of a step and what is learnt from them; a placement knows which parameters this process
holds, runs forward and backward over its share of the samples, and does what needs the other processes: sums of
gradients, the global norm, the mean loss. `Whole` is one process with everything; other placements cut the model by a
`Layout`. For the same seed and samples all give the same loss and the same update, within the order of their sums.

What is averaged: the loss of a step is the mean over every unit of its *global* batch (a predicted token, a pair), over
all micro-batches and all ranks that hold data. So an objective divides what it sums by the counts of the global batch,
and shares of the loss add up.

What an objective sees of a model is a `Reading`: losses of tokens, log-probabilities of rows, rewards. Whether the hidden
states behind it are cut over ranks, or the vocabulary is, the reading knows; the objective does not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from puna.parallel.brought import Brought

Cut = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # name -> shape of the whole, and where the piece begins


class Batch(Protocol):
    """One micro-batch: rows of samples that go through the model together."""

    @property
    def rows(self) -> Any:
        """What the model reads: tokens, targets, positions, documents and weights, each (B, T)."""
        ...

    @property
    def counts(self) -> tuple[float, ...]:
        """How many there are of each kind of unit that the loss is a mean of: predicted tokens, pairs."""
        ...

    @property
    def samples(self) -> int:
        """Pieces that it can be cut into: rows, or pairs of them."""
        ...

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and the tokens in each, as the model computes them."""
        ...

    def take(self, which: slice) -> "Batch":
        """Some of its samples."""
        ...

    def to(self, device: torch.device) -> "Batch": ...


class Reading(Protocol):
    """What a model says of a batch's rows."""

    def token_losses(self) -> Tensor:
        """The weighted sum over the rows' targets of their losses, in nats: a rank's own share of it."""
        ...

    def log_probs(self, weights: Tensor) -> Tensor:
        """Sum over each row of weight * log p(target), (W, B), for W weightings (W, B, T) that are not negative."""
        ...

    def rewards(self, places: Tensor) -> Tensor:
        """What a reward model's head gives each row, (B,), read at the place `places` (B,)."""
        ...


class Objective(Protocol):
    """What is learnt."""

    noted: tuple[str, ...]  # the names of what is logged beside the loss

    def loss(self, reading: Reading, batch: Any, totals: tuple[float, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        """What a batch adds to the loss of the global batch, whose counts are `totals`, and to the `noted` numbers."""
        ...


Ask = Callable[[Reading, Any], Tensor]  # of a reading of a batch: a number per row, (B,)


class Placement(Protocol):
    """A model in its place. Every method but the attributes is called by all ranks together, in the same order."""

    parts: list[nn.Module]  # what this rank holds
    rank: int
    world: int
    data_rank: int  # which share of the samples this rank computes
    data_ranks: int  # how many shares there are
    parameters: int  # of the model, over all ranks
    brought: Brought  # what this rank gave into the last step's sums of gradients

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, by the names they have in one process."""
        ...

    def backward(self, data: Objective, batches: Sequence[Batch]) -> tuple[float, dict[str, float]]:
        """Gradients of this rank's micro-batches, and the mean loss over the global batch with its notes.

        Gradients are summed in float32 and are those of the global mean; they replace what was there.
        """
        ...

    def clip(self, most: float) -> float:
        """The global norm of all gradients, which are scaled in place so that it is `most` at the most."""
        ...

    def updated(self) -> None:
        """The parameters have changed: refresh whatever is computed from them."""
        ...

    def validate(self, data: Objective, batches: Sequence[Batch]) -> float:
        """The mean loss, without gradients, over the units of all batches of all data ranks."""
        ...

    def read(self, ask: Ask, count: int, batch: Callable[[int], Batch]) -> list[Tensor]:
        """What `ask` says of each of `count` batches, which `batch` makes by number, without gradients: on every rank all of
        it, on the CPU. Ranks that hold data share the work."""
        ...

    def whole(self) -> nn.Module | None:
        """The complete model, for a checkpoint: on rank 0, None on the others."""
        ...

    def join(self, named: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """Whole tensors on rank 0 from the parts of all ranks; on the others nothing. All run it to its end."""
        ...

    def part(self, name: str, given: Tensor) -> Tensor:
        """What this rank holds of a tensor that lies as the parameter `name` does (a moment of it, its average), as the
        parameter does: from the whole tensor, or from this rank's piece of it."""
        ...

    def pieces(self, named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Cut]:
        """What this rank holds, as plain tensors that share memory, and which of them are pieces of larger ones."""
        ...

    def change_wholes(
        self, pieces: Iterable[tuple[str, Tensor]], change: Callable[[Tensor], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """What `change` makes of whole matrices: this rank's `pieces` (plain, as the parameters of these names are cut) go
        in, and those of the changed matrices come out, in the same order. Shape and type of numbers stay."""
        ...

    def most(self, value: int) -> int:
        """The largest `value` of any rank: how ranks agree."""
        ...
