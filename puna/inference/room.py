"""How much room a cache of keys and values has."""

import os

from puna.config import require
from puna.inference.spans import BLOCK_TOKENS
from puna.model.sizes import LlamaConfig

KINDS = ("model", "int8")
CACHE_BYTES = 2 << 30


def bytes_per_token(config: LlamaConfig, value_bytes: int, kv: str = "model") -> int:
    """What the keys and values of a position take, in all layers together; `value_bytes` is the size of a number."""
    check_kind(kv)
    heads = 2 * config.n_layers * config.n_kv_heads
    return heads * (config.head_dim + 4 if kv == "int8" else config.head_dim * value_bytes)


def check_kind(kv: str) -> None:
    """Raises `ConfigError` unless keys and values can be kept so."""
    require(kv in KINDS, f"kv={kv!r} is not a way to keep keys and values", hint=f"known: {', '.join(KINDS)}")


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


def memory() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4 * CACHE_BYTES
