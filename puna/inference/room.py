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


def cache_blocks(
    config: LlamaConfig,
    block_bytes: int,
    memory: int,
    *,
    blocks: int | None = None,
    cache_bytes: int | None = None,
) -> int:
    """How many blocks a cache has: as many as are asked for, or as fit `cache_bytes`.

    Without a wish it is 2 GiB, or what one sequence of the full context takes if that is more, but at most half of
    `memory` (which is touched only as it is needed). Raises `ConfigError` for less than a block, and for more than `memory`.
    """
    if blocks is None and cache_bytes is None:
        whole = -(-config.context // BLOCK_TOKENS) * block_bytes
        cache_bytes = min(max(CACHE_BYTES, whole), memory // 2)
    if blocks is None:
        too_little = f"cache_bytes={cache_bytes:,} is less than a block of the cache takes: {block_bytes:,}"
        require(cache_bytes >= block_bytes, too_little, hint=f"give it {_shown(block_bytes)} or more")
        blocks = cache_bytes // block_bytes
    asked = f"a cache of {blocks * BLOCK_TOKENS:,} tokens takes {_shown(blocks * block_bytes)}"
    most = memory // block_bytes * BLOCK_TOKENS
    require(
        blocks * block_bytes <= memory,
        f"{asked}, and there are {_shown(memory)} of memory",
        hint=f"ask for less than {most:,} tokens, or keep keys and values as int8",
    )
    return blocks


def _shown(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count:,} bytes"


def memory() -> int:
    """Bytes of the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not on every system
        return 4 * CACHE_BYTES
