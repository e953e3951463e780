"""What a rank brings to the sum of gradients, as it is just before the exchange.

After the sum all ranks hold the same numbers, also where one of them brought a wrong one. So whoever wants to know whose
number was wrong has to look before. `Brought` does when it is told to: it makes a hash of everything that this rank gives
into the sums of one step. Computed a second time, the hash must be the same, bit for bit.
"""

from collections.abc import Callable

import torch
import xxhash
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter


class Brought:
    """A rank's gradients before the sum. Costs nothing unless `watched`."""

    def __init__(self) -> None:
        self.watched = False
        self.meddle: Callable[[Tensor], None] | None = None  # where tests flip bits
        self._hash = xxhash.xxh3_128()

    def begin(self) -> None:
        """A step's gradients begin to be computed, perhaps once more."""
        self._hash.reset()

    def bring(self, gradients: Tensor) -> None:
        """These gradients go into a sum now."""
        if self.meddle is not None:
            self.meddle(gradients)
        if self.watched:
            raw = gradients.detach().contiguous().view(-1).view(torch.uint8).cpu()
            self._hash.update(memoryview(raw.numpy()))

    @property
    def digest(self) -> bytes:
        """Of all that was brought since `begin`."""
        return self._hash.digest()


class WatchedReduceScatter(DefaultReduceScatter):
    """FSDP's sum, which shows what goes into it.

    For each sum FSDP asks for two pieces of memory: one that it fills with this rank's gradients, and then one for the
    result. So the first is full when the second is asked for, also where nothing is scattered and all is summed.
    """

    def __init__(self, brought: Brought):
        self.brought = brought
        self._filled: Tensor | None = None

    def allocate(self, *arguments: object, **named: object) -> Tensor:
        memory = super().allocate(*arguments, **named)
        if self._filled is None:
            self._filled = memory
        else:
            self.brought.bring(self._filled)
            self._filled = None
        return memory
