"""Weights into blocks: for each block the scales with the smallest squared error that a short search finds.

The customary scale spreads the largest weight over the whole range of q: d = max / 8 for Q4_0. A smaller or larger one
often fits the other 31 weights better, so a row of such ranges is tried; for each, the weights are rounded to q, and
the best d for these q follows from least squares:

    one scale        d = sum(x q) / sum(q q)
    with an offset   d, m minimise sum((d q + m - x)^2), m <= 0 since the format subtracts it

The trial with the smallest error wins. The K types do this for each group, then round the groups' scales (and offsets)
to their few bits, and at last round the weights again with what was kept. float16 scales are rounded before the
weights are, not after. Encoders map float32 (blocks, weights) to uint8 (blocks, bytes), as `blocks.py` lays them out,
and give the same bytes for the same weights.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from puna.model.gguf import blocks

_TRIALS = 15  # ranges tried; more find nothing worth their time


def _rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """x / scale as whole numbers in [low, high]; zero where the scale is zero."""
    return torch.where(scale == 0, 0.0, x / scale).round_().clamp_(low, high)


def _half(scale: Tensor) -> Tensor:
    """What is left of a scale once it is stored as float16."""
    return scale.half().float()


def _bytes(scale: Tensor) -> Tensor:
    """Scales (blocks, n) as the bytes of float16, (blocks, 2 n)."""
    return scale.half().contiguous().view(torch.uint8)


def _best_scale(x: Tensor, limit: int) -> Tensor:
    """The scale (..., 1) with which `x` (..., n) is best told by whole numbers in [-limit, limit - 1].

    The number of largest size takes the side of the range that reaches further, so a scale may be negative.
    """
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best, least = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for trial in range(_TRIALS):
        reach = limit + 0.1 * (trial - _TRIALS // 2)
        q = _rounded(x, largest / -reach, -limit, limit - 1)
        scale = (x * q).sum(-1, keepdim=True) / (q * q).sum(-1, keepdim=True).clamp(min=1)
        best, least = _better(x, scale * q, best, least, scale)
    return best


def _better(x: Tensor, told: Tensor, best: Tensor, least: Tensor, trial: Tensor) -> tuple[Tensor, Tensor]:
    """The trial's scale (and offset) wherever its squared error is the least so far; and the errors."""
    error = (told - x).square_().sum(-1, keepdim=True)
    return torch.where(error < least, trial, best), torch.minimum(error, least)


def _best_scale_and_offset(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(s, t), both (..., 1) and not negative, with which `x` (..., n) is best told as s * q - t, q in [0, limit]."""
    count = x.shape[-1]
    low = x.amin(-1, keepdim=True).clamp(max=0)
    span = x.amax(-1, keepdim=True) - low
    best, least = torch.cat([torch.zeros_like(low), -low], -1), torch.full_like(low, torch.inf)
    sum_x = x.sum(-1, keepdim=True)
    for trial in range(_TRIALS):
        q = _rounded(x - low, span / (limit + 0.1 * (trial - _TRIALS // 2)), 0, limit)
        sum_q, sum_qq, sum_xq = (v.sum(-1, keepdim=True) for v in (q, q * q, x * q))
        spread = count * sum_qq - sum_q * sum_q
        scale = (count * sum_xq - sum_x * sum_q) / spread.clamp(min=1)
        offset = (sum_q * sum_xq - sum_qq * sum_x) / spread.clamp(min=1)
        alone = (spread < 1) | (offset < 0)  # all q are one number, or the offset would raise: without it
        scale = torch.where(alone, sum_xq / sum_qq.clamp(min=1), scale).clamp_(min=0)
        offset = torch.where(alone, torch.where(sum_q == 0, -sum_x / count, 0.0), offset).clamp_(min=0)
        best, least = _better(x, scale * q - offset, best, least, torch.cat([scale, offset], -1))
    return best[..., :1], best[..., 1:]


def _nibbles(q: Tensor, width: int) -> Tensor:
    """Numbers of four bits (blocks, n), in bytes (blocks, n / 2) as `blocks.py` reads them with this width."""
    low, high = q.view(len(q), -1, 2, width).unbind(2)
    return (low | high << 4).flatten(1)


def _q8_0(x: Tensor) -> Tensor:
    scale = _half(x.abs().amax(-1, keepdim=True) / 127)
    q = _rounded(x, scale, -127, 127).to(torch.int8)
    return torch.cat([_bytes(scale), q.view(torch.uint8)], 1)


def _q4_0(x: Tensor) -> Tensor:
    scale = _half(_best_scale(x, 8))
    q = (_rounded(x, scale, -8, 7) + 8).to(torch.uint8)
    return torch.cat([_bytes(scale), _nibbles(q, 16)], 1)


def _q4_k(x: Tensor) -> Tensor:
    groups = x.view(-1, 8, 32)
    scale, offset = _best_scale_and_offset(groups, 15)  # (blocks, 8, 1) each
    d, dmin = (_half(v.amax(1) / 63) for v in (scale, offset))  # (blocks, 1)
    s, t = _rounded(scale[..., 0], d, 0, 63), _rounded(offset[..., 0], dmin, 0, 63)  # (blocks, 8)
    q = _rounded(groups + (dmin * t)[..., None], (d * s)[..., None], 0, 15).to(torch.uint8)
    head = torch.cat([_bytes(d), _bytes(dmin), _six_bits(s.to(torch.uint8), t.to(torch.uint8))], 1)
    return torch.cat([head, _nibbles(q.flatten(1), 32)], 1)


def _six_bits(s: Tensor, t: Tensor) -> Tensor:
    """The inverse of `blocks.scales_and_offsets`."""
    low, high = slice(0, 4), slice(4, 8)
    tops = [v[:, low] | v[:, high] >> 4 << 6 for v in (s, t)]
    return torch.cat([*tops, s[:, high] & 15 | t[:, high] << 4], 1)


def _q6_k(x: Tensor) -> Tensor:
    groups = x.view(-1, 16, 16)
    scale = _best_scale(groups, 32)[..., 0]  # (blocks, 16)
    # Small weights make d a subnormal float16 with few bits. One step of room for s makes up for a d rounded down.
    d = _half(scale.gather(1, scale.abs().argmax(1, keepdim=True)) / -127)
    s = _rounded(scale, d, -128, 127)
    q = (_rounded(groups, (d * s)[..., None], -32, 31) + 32).to(torch.uint8).flatten(1)
    twos = (q >> 4).view(len(q), 2, 4, 32)
    high = twos[:, :, 0] | twos[:, :, 1] << 2 | twos[:, :, 2] << 4 | twos[:, :, 3] << 6
    return torch.cat([_nibbles(q & 15, 64), high.flatten(1), s.to(torch.int8).view(torch.uint8), _bytes(d)], 1)


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: x.to(dtype).contiguous().view(torch.uint8)


ENCODERS: Mapping[blocks.BlockType, Callable[[Tensor], Tensor]] = {
    blocks.F32: _plain(torch.float32),
    blocks.F16: _plain(torch.float16),
    blocks.BF16: _plain(torch.bfloat16),
    blocks.Q8_0: _q8_0,
    blocks.Q4_0: _q4_0,
    blocks.Q4_K: _q4_k,
    blocks.Q6_K: _q6_k,
}


def encode(x: Tensor, kind: blocks.BlockType) -> Tensor:
    """Rows (..., a multiple of kind.weights), of any float type, as uint8 (blocks, kind.bytes)."""
    return ENCODERS[kind](x.float().reshape(-1, kind.weights))
