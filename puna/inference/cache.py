"""The keys and values of the tokens that were already read.

    keys, values    (L, slots, K, S, E)    one slot per running sequence, one index of S per position

Slots in use are 0 to n-1 without gaps, so that a decoding step reads the first n as they lie. When a sequence ends the
last slot moves into its place. Both dimensions grow by doubling, when a sequence comes or gets longer.

The cache is what the model's `attend` means at inference: it writes the new keys and values, then lets the queries read
all that their sequence has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from puna.kernels.attention import attention
from puna.model.llama import Attend
from puna.model.sizes import LlamaConfig


class KVCache:
    """Keys and values of up to `slots` sequences, of up to `length` positions each; grows by `reserve`."""

    def __init__(self, config: LlamaConfig, dtype: torch.dtype):
        self._config = config
        self.keys = self._room(0, 0, dtype)
        self.values = self._room(0, 0, dtype)

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[3]

    @property
    def bytes(self) -> int:
        return 2 * self.keys.numel() * self.keys.element_size()

    def reserve(self, slots: int, length: int) -> None:
        """Make sure that there are `slots` slots of `length` positions; what is there stays."""
        if slots <= self.slots and length <= self.length:
            return
        slots = self.slots if slots <= self.slots else max(slots, min(2 * self.slots, 16))
        length = self.length if length <= self.length else min(_doubled(length), max(self._config.context, length))
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._room(slots, length, old.dtype)
            new[:, : old.shape[1], :, : old.shape[3]] = old
            setattr(self, name, new)
            del old

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of slot `source` over those of `target`."""
        for room in (self.keys, self.values):
            room[:, target, :, :length] = room[:, source, :, :length]

    def spread(self, first: int, sources: list[int], length: int) -> None:
        """Fill slot `first` + i with the first `length` positions of slot `first` + sources[i], for all i at once."""
        for room in (self.keys, self.values):
            slots = room[:, first : first + len(sources), :, :length]
            slots.copy_(slots[:, sources])

    def clear(self) -> None:
        """Give the memory back."""
        self.keys, self.values = (self._room(0, 0, self.keys.dtype) for _ in range(2))

    def prefill(self, first: int, start: int) -> Attend:
        """Attention for T tokens of the sequences in slots `first`, `first`+1, ..., at positions `start` onwards."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            B, T = q.shape[:2]
            keys, values = (room[layer, first : first + B, :, : start + T] for room in (self.keys, self.values))
            keys[:, :, start:] = k.transpose(1, 2)
            values[:, :, start:] = v.transpose(1, 2)
            if start == 0:
                return attention(q, k, v, None)
            mask = torch.ones(1, 1, T, start + T, dtype=torch.bool).tril(start)
            return attention(q, keys.transpose(1, 2), values.transpose(1, 2), mask, impl="sdpa")

        return attend

    def decode(self, positions: Tensor) -> Attend:
        """Attention for one token of each of the first n slots, at `positions` (n,).

        The query heads that share a key/value head are its queries: H = K * G becomes (K, G), and nothing is repeated.
        """
        n, S = len(positions), int(positions.max()) + 1
        rows = torch.arange(n)
        ahead = torch.arange(S) > positions[:, None]  # (n, S)
        mask = torch.zeros(n, 1, 1, S, dtype=self.keys.dtype).masked_fill_(ahead[:, None, None], -torch.inf)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            K = k.shape[2]
            keys, values = self.keys[layer, :n], self.values[layer, :n]
            keys[rows, :, positions] = k[:, 0]
            values[rows, :, positions] = v[:, 0]
            q = q.view(n, K, -1, q.shape[-1])  # (n, K, G, E)
            attended = F.scaled_dot_product_attention(q, keys[:, :, :S], values[:, :, :S], attn_mask=mask)
            return attended.reshape(n, 1, -1, q.shape[-1])

        return attend

    def _room(self, slots: int, length: int, dtype: torch.dtype) -> Tensor:
        """Zeros, not whatever memory held: a masked position has weight 0, and 0 times NaN is NaN."""
        c = self._config
        return torch.zeros(c.n_layers, slots, c.n_kv_heads, length, c.head_dim, dtype=dtype)


def _doubled(length: int) -> int:
    """The next power of two, at least 64."""
    return max(64, 1 << (length - 1).bit_length())
