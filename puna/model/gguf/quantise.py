"""Weights into blocks: for each block the scales with the smallest error that a short search finds.

The customary scale spreads the largest weight over the whole range of q: d = max / 8 for Q4_0. A smaller or larger one
often fits the other 31 weights better, so a row of such ranges is tried; for each, the weights are rounded to q, and
the best d for these q follows from least squares:

    one scale        d = sum(w x q) / sum(w q q)                               sum(w x x) falls by  d sum(w x q)
    with an offset   s, t minimise sum(w (s q - t - x)^2), s and t >= 0        it falls by  s sum(w x q) - t sum(w x)

The trial that takes most off the squared error wins. An error counts w = |x| + mean |x|: what is large is multiplied
with what is large more often than not, and no weight counts nothing.

The K types do this for each group, then round the groups' scales (and offsets) to their few bits. That moves them, so
each is tried one step up and down as well; then Q4_K finds d and dmin anew by least squares, settles the groups' again,
and keeps what is better. float16 scales are rounded before the weights are, not after. Encoders map float32 (blocks,
weights) to uint8 (blocks, bytes), as `blocks.py` lays them out, and give the same bytes for the same weights.

`encode` does the same in C++ where there are kernels (`kernels/native/encode.h`): the same operations in the same order,
so that the bytes are the same. What is below is what they are compared with, and what runs where they were not built.
Within it, the first dimension counts the weights of a group: x (n, ...).
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from puna.config import require
from puna.kernels import native
from puna.model.gguf import blocks

Implementation = Literal["auto", "reference", "native"]
_TRIALS = 15  # ranges tried; more find nothing worth their time
_TINY = 1e-30  # what is smaller counts as nothing


def _sum(values: Tensor) -> Tensor:
    """Over the first dimension, one after the other: the order that the kernels have."""
    return sum(values.unbind(0), torch.zeros(values.shape[1:]))


def _over(numerator: Tensor | float, x: Tensor) -> Tensor:
    """numerator / x, or zero where x is nothing."""
    whole = torch.as_tensor(numerator, dtype=torch.float32)  # a plain number / x is computed as its product with 1 / x
    return torch.where(x.abs() < _TINY, 0.0, whole / x)


def _rounded(x: Tensor, low: float, high: float) -> Tensor:
    return x.round().clamp(low, high)


def _half(scale: Tensor) -> Tensor:
    """What is left of a scale once it is stored as float16."""
    return scale.half().float() + 0.0  # no zero with a sign


def _bytes(scale: Tensor) -> Tensor:
    """A scale (blocks,) as the bytes of float16, (blocks, 2)."""
    return scale.half()[:, None].view(torch.uint8)


def _importance(x: Tensor) -> Tensor:
    size = x.abs()
    return _sum(size) * (1 / len(x)) + size


def _further(low: Tensor, high: Tensor) -> Tensor:
    """The one of larger size."""
    return torch.where(high < -low, low, high)


def _reaches(limit: int) -> list[float]:
    """How far the largest weight of a group may reach in each trial, as float32."""
    step = np.float32(0.1)
    return [float(np.float32(limit) + step * np.float32(trial - _TRIALS // 2)) for trial in range(_TRIALS)]


def _best_scale(x: Tensor, w: Tensor, limit: int) -> Tensor:
    """The scale with which `x` is best told by whole numbers in [-limit, limit - 1].

    The number of largest size takes the side of the range that reaches further, so a scale may be negative.
    """
    largest = _further(x.amin(0), x.amax(0))
    best = most = torch.zeros_like(largest)
    for reach in [*_reaches(limit), None]:  # at last from the best scale
        inverse = _over(1.0, best) if reach is None else _over(-reach, largest)
        q = _rounded(x * inverse, -limit, limit - 1)
        wq = w * q
        xq, qq = _sum(wq * x), _sum(wq * q)
        scale = _over(xq, qq)
        gain = scale * xq
        best, most = torch.where(most < gain, scale, best), torch.where(most < gain, gain, most)
    return best


def _best_line(x: Tensor, w: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(s, t), neither negative, with which `x` is best told as s * q - t, q in [0, limit]."""
    low = x.amin(0).clamp(max=0)
    span, sum_w, sum_x = x.amax(0) - low, _sum(w), _sum(w * x)
    best_s = best_t = torch.zeros_like(low)
    most = torch.full_like(low, -1.0)
    for reach in [*_reaches(limit), None]:
        inverse, below = (_over(1.0, best_s), best_t) if reach is None else (_over(reach, span), 0 - low)
        q = _rounded((x + below) * inverse, 0, limit)
        wq = w * q
        sum_q, sum_qq, sum_xq = _sum(wq), _sum(wq * q), _sum(wq * x)
        both = sum_w * sum_qq
        spread = both - sum_q * sum_q
        s, t = (_over(sum_w * sum_xq - sum_x * sum_q, spread), _over(sum_q * sum_xq - sum_qq * sum_x, spread))
        # Where all q are one number, or the offset would raise: a scale alone, or an offset alone.
        alone_s = _over(sum_xq, sum_qq).clamp(min=0)
        alone_t = torch.where(sum_qq < _TINY, (0 - _over(sum_x, sum_w)).clamp(min=0), 0.0)
        fits = both * 1e-6 < spread
        s, t = torch.where(fits, s, alone_s), torch.where(fits, t, alone_t)
        s, t = torch.where(t < 0, alone_s, s).clamp(min=0), torch.where(t < 0, alone_t, t)
        gain = s * sum_xq - t * sum_x
        better = most < gain
        best_s, best_t, most = (torch.where(better, *p) for p in ((s, best_s), (t, best_t), (gain, most)))
    return best_s, best_t


def _numbers(x: Tensor, scale: Tensor, offset: Tensor | float, low: int, high: int) -> Tensor:
    """The q of `x` = scale * q - offset."""
    return _rounded((x + offset) * _over(1.0, scale), low, high)


def _error(x: Tensor, w: Tensor, scale: Tensor, offset: Tensor | float, low: int, high: int) -> Tensor:
    off = scale * _numbers(x, scale, offset, low, high) - offset - x
    return _sum(w * (off * off))


def _nibbles(q: Tensor, width: int) -> Tensor:
    """Numbers of four bits (blocks, n), in bytes (blocks, n / 2) as `blocks.py` reads them with this width."""
    low, high = q.view(len(q), -1, 2, width).unbind(2)
    return (low | high << 4).flatten(1)


def _q8_0(rows: Tensor) -> Tensor:
    x = rows.T.contiguous()
    scale = _half(torch.maximum(x.amax(0), 0 - x.amin(0)) * (1 / 127))
    q = _rounded(_over(x, scale.expand_as(x)), -127, 127).T.to(torch.int8)
    return torch.cat([_bytes(scale), q.view(torch.uint8)], 1)


def _q4_0(rows: Tensor) -> Tensor:
    x = rows.T.contiguous()
    scale = _half(_best_scale(x, _importance(x), 8))
    q = (_rounded(_over(x, scale.expand_as(x)), -8, 7) + 8).T.to(torch.uint8)
    return torch.cat([_bytes(scale), _nibbles(q, 16)], 1)


def _q4_k(rows: Tensor) -> Tensor:
    x = rows.view(-1, 8, 32).permute(2, 1, 0).contiguous()  # (32, 8, blocks)
    w = _importance(x)
    scale, offset = _best_line(x, w, 15)  # (8, blocks) each
    d, dmin = (_half(v.amax(0) / 63) for v in (scale, offset))
    s, t = (_rounded(_over(v, unit.expand_as(v)), 0, 63) for v, unit in ((scale, d), (offset, dmin)))
    s, t, wrong = _settled(x, w, d, dmin, s, t)
    d2, dmin2 = _fitted(x, w, d, dmin, s, t)
    s2, t2, wrong2 = _settled(x, w, d2, dmin2, s, t)
    better = wrong2 < wrong
    d, dmin, s, t = (torch.where(better, new, old) for new, old in ((d2, d), (dmin2, dmin), (s2, s), (t2, t)))
    q = _numbers(x, d * s, dmin * t, 0, 15).permute(2, 1, 0).flatten(1).to(torch.uint8)
    head = torch.cat([_bytes(d), _bytes(dmin), _six_bits(s.T.to(torch.uint8), t.T.to(torch.uint8))], 1)
    return torch.cat([head, _nibbles(q, 32)], 1)


def _settled(x: Tensor, w: Tensor, d: Tensor, dmin: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s and t of each group moved by one where that lowers the error; and the blocks' errors."""
    s0, t0 = s, t
    least = _error(x, w, d * s, dmin * t, 0, 15)
    for move in (0, 1, 2, 3, 5, 6, 7, 8):
        s1, t1 = (s0 + (move // 3 - 1)).clamp(0, 63), (t0 + (move % 3 - 1)).clamp(0, 63)
        here = _error(x, w, d * s1, dmin * t1, 0, 15)
        better = here < least
        s, t, least = (torch.where(better, *pair) for pair in ((s1, s), (t1, t), (here, least)))
    return s, t, _sum(least)


def _fitted(x: Tensor, w: Tensor, d: Tensor, dmin: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """d and dmin by least squares for the numbers that they give now."""
    q = _numbers(x, d * s, dmin * t, 0, 15)
    wq = w * q
    sum_q, sum_qq, sum_xq, sum_x = _sum(wq), _sum(wq * q), _sum(wq * x), _sum(w * x)
    ss, st, tt = _sum(s * s * sum_qq), _sum(s * t * sum_q), _sum(t * t * _sum(w))
    sx, tx = _sum(s * sum_xq), _sum(t * sum_x)
    both = ss * tt
    spread = both - st * st
    fits = both * 1e-6 < spread
    new_d = torch.where(fits, _over(tt * sx - st * tx, spread), _over(sx, ss))
    new_dmin = torch.where(fits, _over(st * sx - ss * tx, spread), dmin)
    return _half(new_d.clamp(min=0)), _half(new_dmin.clamp(min=0))


def _six_bits(s: Tensor, t: Tensor) -> Tensor:
    """The inverse of `blocks.scales_and_offsets`."""
    low, high = slice(0, 4), slice(4, 8)
    tops = [v[:, low] | v[:, high] >> 4 << 6 for v in (s, t)]
    return torch.cat([*tops, s[:, high] & 15 | t[:, high] << 4], 1)


def _q6_k(rows: Tensor) -> Tensor:
    x = rows.view(-1, 16, 16).permute(2, 1, 0).contiguous()  # (16, 16 groups, blocks)
    w = _importance(x)
    scale = _best_scale(x, w, 32)
    # Small weights make d a subnormal float16 with few bits. One step of room for s makes up for a d rounded down.
    d = _half(_further(scale.amin(0), scale.amax(0)) / -127)
    s = s0 = _rounded(_over(scale, d.expand_as(scale)), -128, 127)
    least = _error(x, w, d * s, 0.0, -32, 31)
    for move in (-1, 1):
        s1 = (s0 + move).clamp(-128, 127)
        here = _error(x, w, d * s1, 0.0, -32, 31)
        s, least = torch.where(here < least, s1, s), torch.where(here < least, here, least)
    q = (_numbers(x, d * s, 0.0, -32, 31) + 32).permute(2, 1, 0).flatten(1).to(torch.uint8)
    twos = (q >> 4).view(len(q), 2, 4, 32)
    high = twos[:, :, 0] | twos[:, :, 1] << 2 | twos[:, :, 2] << 4 | twos[:, :, 3] << 6
    scales = s.T.to(torch.int8).view(torch.uint8)
    return torch.cat([_nibbles(q & 15, 64), high.flatten(1), scales, _bytes(d)], 1)


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
_SOURCES = (torch.float32, torch.bfloat16, torch.float16)


def encode(x: Tensor, kind: blocks.BlockType, *, impl: Implementation = "auto") -> Tensor:
    """Rows (..., a multiple of kind.weights), of any float type, as uint8 (blocks, kind.bytes)."""
    return encode_measured(x, kind, impl=impl)[0]


def encode_measured(x: Tensor, kind: blocks.BlockType, *, impl: Implementation = "auto") -> tuple[Tensor, float]:
    """As `encode`, and the size of the largest weight: infinite where one is not finite.

    Raises `ConfigError` if `native` is asked for and cannot be had.
    """
    fit = kind.parts is not None and native.available()
    require(
        fit or impl != "native", f"there is no kernel for {kind.name} here: {native.why_not() or 'it is not packed'}"
    )
    if fit and impl != "reference":
        x = x if x.dtype in _SOURCES else x.float()
        return native.encode(_team(), x, kind.code, kind.weights, kind.bytes)
    low, high = (float(v) for v in x.aminmax())
    largest = max(-low, high) if -np.inf < low <= high < np.inf else np.inf  # NaN is not less than anything
    same = ENCODERS[kind](x if x.dtype == kind.plain else x.float().reshape(-1, kind.weights))
    return same, largest


@cache
def _team() -> native.Team:
    return native.Team(torch.get_num_threads())
