"""What general-purpose compressors make of the held-out text: the baselines that need no training.

Three questions, which differ by how much the compressor has seen before the text it is charged for:

    each    every excerpt on its own, from nothing: what the compressor knows about text in general
    all     the excerpts one after another: it learns from each excerpt for the next
    primed  size(training text + excerpts) - size(training text): it has the same training text as the models

The language models are to be compared with `primed`: it is the strongest and the fair one. Sizes are of raw streams
(DEFLATE, LZMA2), without the containers' headers and checksums, since a model is not charged for a file name either.
DEFLATE sees back 32 KB only, so priming it would change nothing, and is not done.
"""

import lzma
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

_LONGEST_DICTIONARY = 1 << 30
_CHUNK = 1 << 20


def gzip_bytes(data: bytes) -> int:
    """The size of `data` as gzip's compressor (DEFLATE, level 9) writes it."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, wbits=-15, memLevel=9)
    return len(compressor.compress(data)) + len(compressor.flush())


def xz_bytes(parts: Iterable[bytes], size: int, *, preset: int = 9 | lzma.PRESET_EXTREME) -> int:
    """The size of the joined `parts`, `size` bytes in all, as xz's compressor (LZMA2) writes them.

    The dictionary holds all of them, so that the whole past can be referred to.
    """
    dictionary = min(max(size, 4096), _LONGEST_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": dictionary}]
    compressor = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=filters)
    return sum(len(compressor.compress(p)) for p in parts) + len(compressor.flush())


def xz_primed_bytes(training: bytes, data: bytes, *, preset: int) -> int:
    """How many more bytes xz needs for `training` and `data` than for `training` alone."""
    size = len(training) + len(data)
    # Both run at once where there are two cores: the compressor works outside the interpreter's lock.
    with ThreadPoolExecutor(2) as pool:
        alone = pool.submit(xz_bytes, _chunks(training), size, preset=preset)
        both = pool.submit(xz_bytes, [*_chunks(training), data], size, preset=preset)
        return both.result() - alone.result()


def _chunks(data: bytes) -> list[memoryview]:
    view = memoryview(data)
    return [view[i : i + _CHUNK] for i in range(0, len(view), _CHUNK)]


def each_bits(texts: Sequence[str]) -> dict[str, list[float]]:
    """Bits of every text compressed on its own, by gzip's and by xz's compressor."""
    data = [t.encode() for t in texts]
    return {
        "gzip_each": [8.0 * gzip_bytes(d) for d in data],
        "xz_each": [8.0 * xz_bytes([d], len(d)) for d in data],
    }
