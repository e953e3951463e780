"""Attention of ragged spans over a paged cache.

New tokens of many sequences stand in one row, and the keys and values of each sequence, the new ones included, lie in
cache blocks that its row of a table names:

    q               (N, H, E)                        span b has tokens begins[b] ... begins[b] + lengths[b] - 1
    keys, values    (blocks, block_tokens, K, E)     position p of span b is in block table[b, p // block_tokens]

Token t of span b is at position starts[b] + t and sees all positions up to its own. Query head h reads key/value head
h // (H / K).

How the fast form divides the work (`divide`) is settled on the host, once for all layers:

short spans    (decode: a token, or a few that were guessed) are cut along the cache into *chunks* of `CHUNK` positions,
               so that one long sequence keeps a whole GPU busy; a second pass joins the partial results (Dao et al.,
               "Flash-Decoding", 2023). Chunks begin at multiples of `CHUNK` whatever the batch is, so a sequence's
               result does not depend on its company.
long spans     (pieces of prompts) are cut along their tokens into *tiles*; each walks over all that it sees.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from puna.kernels.triton import Implementation, chosen

CHUNK = 256  # positions
SHORT_ROWS, TILE_ROWS = 32, 64  # (token, query head) pairs of a program; heads are those that share keys


@dataclass(frozen=True)
class Division:
    """Who computes what: numbers of chunks and tiles, summed over the spans before each."""

    chunks: np.ndarray  # (B + 1,) int32
    tiles: np.ndarray  # (B + 1,) int32
    short: int  # tokens of the longest short span; 0 if there is none


@dataclass(frozen=True)
class Ragged:
    """Spans on the device, int32, and their division. The numbers without a tensor bound what the tensors say."""

    begins: Tensor  # (B,)
    starts: Tensor  # (B,)
    lengths: Tensor  # (B,)
    table: Tensor  # (B, M)
    chunks: Tensor  # (B + 1,)
    tiles: Tensor  # (B + 1,)
    short: int
    most_chunks: int
    most_tiles: int


def divide(starts: np.ndarray, lengths: np.ndarray, grouped: int) -> Division:
    """Cut spans at `starts` of `lengths` (B,) into chunks and tiles; `grouped` query heads share a key/value head."""
    is_short = lengths <= max(1, SHORT_ROWS // grouped)
    chunks = np.where(is_short, -(-(starts + lengths) // CHUNK), 0)
    tiles = np.where(is_short, 0, -(-lengths // tile_tokens(grouped)))
    short = int(lengths[is_short].max(initial=0))
    return Division(_sums(chunks), _sums(tiles), short)


def tile_tokens(grouped: int) -> int:
    """The tokens of a tile."""
    return max(1, TILE_ROWS // grouped)


def _sums(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()]).astype(np.int32)


def paged_attention(q: Tensor, keys: Tensor, values: Tensor, spans: Ragged, *, impl: Implementation = "auto") -> Tensor:
    """Attend from `q` (N, H, E) to the cache `keys`, `values`; the result is (N, H, E)."""
    if chosen(impl, q):
        from puna.kernels.triton.paged_attention import paged_attention as fused

        return fused(q, keys, values, spans)
    return _reference(q, keys, values, spans)


def _reference(q: Tensor, keys: Tensor, values: Tensor, spans: Ragged) -> Tensor:
    """Span by span."""
    out = torch.empty_like(q)
    block_tokens, K = keys.shape[1:3]
    numbers = zip(spans.begins.tolist(), spans.starts.tolist(), spans.lengths.tolist())
    for b, (begin, start, length) in enumerate(numbers):
        end = start + length
        blocks = spans.table[b, : -(-end // block_tokens)].long()
        k, v = (room[blocks].flatten(0, 1)[:end].transpose(0, 1) for room in (keys, values))  # (K, S, E)
        mine = q[begin : begin + length].unflatten(1, (K, -1)).permute(1, 2, 0, 3)  # (K, H / K, T, E)
        sees = torch.arange(end, device=q.device) <= torch.arange(start, end, device=q.device)[:, None]
        got = F.scaled_dot_product_attention(mine, k[:, None], v[:, None], attn_mask=sees)
        out[begin : begin + length] = got.permute(2, 0, 1, 3).flatten(1, 2)
    return out
