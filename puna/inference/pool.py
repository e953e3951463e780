"""The memory behind the blocks of the reference runner.

    keys, values    (L, blocks, 16, K, E)    in the model's type, or int8 with a scale per position and head

On a CPU the pool is asked for as zeros that the system hands out when they are first written, so an idle engine's
memory is that of its weights. Zeros, not whatever memory held: a masked position has weight 0, and 0 times NaN is NaN.
"""

import os

import numpy as np
import torch
from torch import Tensor

from puna.config import require
from puna.inference.spans import BLOCK_TOKENS
from puna.model.sizes import LlamaConfig

KINDS = ("model", "int8")
CACHE_BYTES = 2 << 30


def bytes_per_token(config: LlamaConfig, dtype: torch.dtype, kv: str = "model") -> int:
    """What the keys and values of a position take, in all layers together."""
    require(kv in KINDS, f"kv={kv!r} is not a way to keep keys and values", hint=f"known: {', '.join(KINDS)}")
    heads = 2 * config.n_layers * config.n_kv_heads
    return heads * (config.head_dim + 4 if kv == "int8" else config.head_dim * dtype.itemsize)


def cache_blocks(config: LlamaConfig, block_bytes: int, cache_bytes: int | None, memory: int) -> int:
    """How many blocks a cache has: what fits `cache_bytes`.

    Without a wish it is 2 GiB, or what one sequence of the full context takes if that is more, but at most half of
    `memory` (which is touched only as it is needed). Raises `ConfigError` for a budget below a block.
    """
    if cache_bytes is None:
        whole = -(-config.context // BLOCK_TOKENS) * block_bytes
        cache_bytes = min(max(CACHE_BYTES, whole), memory // 2)
    too_little = f"cache_bytes={cache_bytes:,} is less than a block of the cache takes: {block_bytes:,}"
    require(cache_bytes >= block_bytes, too_little)
    return cache_bytes // block_bytes


def memory_of(device: torch.device) -> int:
    """Bytes: those of the machine, or those that are free on a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4 * CACHE_BYTES


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
