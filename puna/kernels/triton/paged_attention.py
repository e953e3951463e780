"""Paged attention in three kernels: chunks of short spans, the joining of their results, tiles of long spans.

The rows of a program are (token, query head) pairs whose heads share a key/value head, so each key is read once for
all of them: row r is token r // G, head r % G of the G = H / K. The sum over positions is the usual one of flash
attention: for each row a running peak of the scores, the sum of 2^(score - peak), and the weighted values, faded
whenever the peak grows. Scores are in units of log 2, as 2^x is cheaper than e^x.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.kernels.paged_attention import CHUNK, Ragged, tile_tokens

_POSITIONS = 64  # read at once
_JOINED = 16  # chunks joined at once
_PROGRAMS = 8  # of the chunks' kernel for each multiprocessor: enough to hide each other's waiting
_LEAST_SEARCH = 128  # spans among which a program looks for its own; one size serves most batches

_VARYING = ("spans", "columns")  # a kernel compiled for each special value would be compiled while requests wait


@triton.jit
def _span_of(item, firsts, spans, SEARCH: tl.constexpr):
    """The span that the chunk or tile `item` belongs to."""
    i = tl.arange(0, SEARCH)
    first = tl.load(firsts + i, mask=i <= spans, other=2147483647)
    return tl.sum((first <= item).to(tl.int32), 0) - 1


@triton.jit
def _walk(
    peak, norm, acc, q, keys, values, blocks, low, end, seen, head, e, scale,
    K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Take the positions low ... low + POSITIONS - 1, as far as they are before `end`, into the running sums."""
    position = low + tl.arange(0, POSITIONS)
    inside = position < end
    block = tl.load(blocks + position // BLOCK, mask=inside, other=0).to(tl.int64)
    where = ((block * BLOCK + position % BLOCK) * K + head) * E
    whole = inside[:, None] & (e < E)[None, :]
    k = tl.load(keys + where[:, None] + e[None, :], mask=whole, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where(inside[None, :] & (position[None, :] <= seen[:, None]), scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weight = tl.exp2(scores - level[:, None])
    fade = tl.exp2(peak - level)
    v = tl.load(values + where[:, None] + e[None, :], mask=whole, other=0.0)
    acc = acc * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
    return higher, norm * fade + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=_VARYING)
def _chunks(
    q, keys, values, begins, starts, lengths, table, firsts, peaks, norms, partial, spans, columns, scale,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    items = tl.load(firsts + spans)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        span = _span_of(item, firsts, spans, SEARCH)
        start, length, begin = tl.load(starts + span), tl.load(lengths + span), tl.load(begins + span)
        token = row // G
        live = (token < length)[:, None] & (e < E)[None, :]
        at = ((begin + token).to(tl.int64) * K + head) * G + row % G
        mine = tl.load(q + at[:, None] * E + e[None, :], mask=live, other=0.0)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        norm = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, WIDTH), tl.float32)
        low = (item - tl.load(firsts + span)) * CHUNK
        blocks = table + span.to(tl.int64) * columns
        for ahead in range(0, CHUNK, POSITIONS):
            peak, norm, acc = _walk(
                peak, norm, acc, mine, keys, values, blocks, low + ahead, start + length, start + token, head, e,
                scale, K, E, BLOCK, POSITIONS,
            )  # fmt: skip
        to = ((item * K + head) * ROWS + row).to(tl.int64)
        tl.store(peaks + to, peak)
        tl.store(norms + to, norm)
        tl.store(partial + to[:, None] * WIDTH + e[None, :], acc, mask=live)


@triton.jit
def _join(
    begins, lengths, firsts, peaks, norms, partial, out,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, JOINED: tl.constexpr,
):  # fmt: skip
    span, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, last = tl.load(firsts + span), tl.load(firsts + span + 1)
    if (first < last) & (token < tl.load(lengths + span)):
        e = tl.arange(0, WIDTH)
        peak = tl.full((1,), float("-inf"), tl.float32)
        norm = tl.zeros((1,), tl.float32)
        acc = tl.zeros((WIDTH,), tl.float32)
        for low in range(first, last, JOINED):
            item = low + tl.arange(0, JOINED)
            there = item < last
            at = (item.to(tl.int64) * K + head // G) * ROWS + token * G + head % G
            peaks_here = tl.load(peaks + at, mask=there, other=float("-inf"))
            norms_here = tl.load(norms + at, mask=there, other=0.0)
            values_here = tl.load(
                partial + at[:, None] * WIDTH + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0
            )
            higher = tl.maximum(peak, tl.max(peaks_here, 0))  # finite: position 0 is seen by all
            weight = tl.exp2(peaks_here - higher)
            fade = tl.exp2(peak - higher)
            norm = norm * fade + tl.sum(weight * norms_here, 0)
            acc = acc * fade + tl.sum(weight[:, None] * values_here, 0)
            peak = higher
        begin = tl.load(begins + span).to(tl.int64)
        to = out + ((begin + token) * K * G + head) * E + e
        tl.store(to, (acc / norm).to(out.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=_VARYING)
def _tiles(
    q, keys, values, begins, starts, lengths, table, firsts, out, spans, columns, scale,
    K: tl.constexpr, G: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)  # those with the most to read first
    span = _span_of(tile, firsts, spans, SEARCH)
    start, length, begin = tl.load(starts + span), tl.load(lengths + span), tl.load(begins + span)
    row = tl.arange(0, ROWS)
    e = tl.arange(0, WIDTH)
    before = (tile - tl.load(firsts + span)) * TOKENS
    token = before + row // G
    live = ((token < length) & (row < TOKENS * G))[:, None] & (e < E)[None, :]
    at = ((begin + token).to(tl.int64) * K + head) * G + row % G
    mine = tl.load(q + at[:, None] * E + e[None, :], mask=live, other=0.0)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    norm = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    end = start + tl.minimum(before + TOKENS, length)
    blocks = table + span.to(tl.int64) * columns
    for low in range(0, end, POSITIONS):
        peak, norm, acc = _walk(
            peak, norm, acc, mine, keys, values, blocks, low, end, start + token, head, e, scale, K, E, BLOCK, POSITIONS
        )
    to = out + at[:, None] * E + e[None, :]
    tl.store(to, (acc / norm[:, None]).to(out.dtype.element_ty), mask=live)


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Ragged) -> Tensor:
    """Attend from `q` (N, H, E) to the cache `keys`, `values`; the result is (N, H, E)."""
    out = torch.empty_like(q)
    (_, H, E), (_, BLOCK, K, _) = q.shape, keys.shape
    G, B, columns = H // K, len(spans.begins), spans.table.shape[1]
    width = max(16, triton.next_power_of_2(E))
    shape = {"K": K, "G": G, "E": E, "WIDTH": width}
    search = max(_LEAST_SEARCH, triton.next_power_of_2(B + 1))
    paged = {"BLOCK": BLOCK, "POSITIONS": _POSITIONS, "SEARCH": search}
    scale = math.log2(math.e) / math.sqrt(E)
    where = (q, keys, values, spans.begins, spans.starts, spans.lengths, spans.table)
    if spans.most_chunks:
        rows = max(16, triton.next_power_of_2(spans.short * G))
        peaks, norms = (q.new_empty(spans.most_chunks * K * rows, dtype=torch.float32) for _ in range(2))
        partial = q.new_empty(spans.most_chunks * K * rows * width, dtype=torch.float32)
        programs = min(spans.most_chunks, max(1, _PROGRAMS * _multiprocessors(q) // K))
        _chunks[(programs, K)](
            *where, spans.chunks, peaks, norms, partial, B, columns, scale, ROWS=rows, CHUNK=CHUNK, **shape, **paged
        )
        _join[(B, spans.short, H)](
            spans.begins, spans.lengths, spans.chunks, peaks, norms, partial, out, ROWS=rows, JOINED=_JOINED, **shape
        )
    if spans.most_tiles:
        tokens = tile_tokens(G)
        rows = max(16, triton.next_power_of_2(tokens * G))
        _tiles[(spans.most_tiles, K)](
            *where, spans.tiles, out, B, columns, scale, TOKENS=tokens, ROWS=rows, **shape, **paged
        )
    return out


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
