"""The memory behind the blocks of the reference runner.

    keys, values    (L, blocks, 16, K, E)    in the model's type, or int8 with a scale per position and head

On a CPU the pool is asked for as zeros that the system hands out when they are first written, so an idle engine's
memory is that of its weights. Zeros, not whatever memory held: a masked position has weight 0, and 0 times NaN is NaN.
"""

import numpy as np
import torch
from torch import Tensor

from puna.config import require
from puna.inference.room import KINDS, memory
from puna.model.sizes import LlamaConfig


def memory_of(device: torch.device) -> int:
    """Bytes: those of the machine, or those that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory()


class Pool:
    """Keys and values of `blocks` blocks, written and read by layer."""

    def __init__(
        self, config: LlamaConfig, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device, kv: str
    ):
        require(kv in KINDS, f"kv={kv!r} is not a way to keep keys and values", hint=f"known: {', '.join(KINDS)}")
        shape = (config.n_layers, blocks, block_tokens, config.n_kv_heads, config.head_dim)
        self.dtype, self.quantised = dtype, kv == "int8"
        self._shape, self._device = shape, device
        self.clear()

    def clear(self) -> None:
        """Forget everything; on a CPU its memory goes back to the system."""
        self._rooms, self._scales = [], []
        self._rooms = [_zeros(self._shape, torch.int8 if self.quantised else self.dtype, self._device) for _ in "kv"]
        if self.quantised:
            self._scales = [_zeros((*self._shape[:-1], 1), torch.float32, self._device) for _ in "kv"]

    def write(self, layer: int, at: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write `keys`, `values` (N, K, E) to the slots `at` (N,): block * block_tokens + position within it."""
        for index, new in enumerate((keys, values)):
            room = self._rooms[index][layer].flatten(0, 1)  # (slots, K, E)
            if self.quantised:
                scale = new.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
                self._scales[index][layer].flatten(0, 1).index_copy_(0, at, scale)
                new = (new.float() / scale).round().to(torch.int8)
            room.index_copy_(0, at, new)

    def read(self, layer: int, table: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the blocks `table` (B, M), each (B, M * block_tokens, K, E)."""
        keys, values = (self._gather(index, layer, table) for index in range(2))
        return keys, values

    def copy(self, source: int, target: int) -> None:
        """Copy a block in every layer."""
        for room in (*self._rooms, *self._scales):
            room[:, target] = room[:, source]

    def _gather(self, index: int, layer: int, table: Tensor) -> Tensor:
        def blocks(room: Tensor) -> Tensor:
            found = room[layer].index_select(0, table.flatten())  # (B M, 16, K, E)
            return found.view(table.shape[0], -1, *found.shape[2:])

        found = blocks(self._rooms[index])
        return (found * blocks(self._scales[index])).to(self.dtype) if self.quantised else found


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    bytes_ = np.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)  # calloc: pages come when written
    return torch.from_numpy(bytes_).view(dtype)
