"""Weights as small integers with a scale per group, and if asked for an offset.

A row of a matrix is cut into groups of `group_size` weights. Each group keeps one float16 scale and a signed integer of
`bits` bits per weight:

    w  ~  scale * code             code in -2^(bits-1) ... 2^(bits-1) - 1
    w  ~  scale * code + offset    with offsets, likewise one float16 per group

The integers reach one further below zero than above, so the scale may be negative: the group's largest weight then gets
the longer side. How large the scale should be is searched: rounding errors of 32 weights add up to more or less by chance,
so of some twenty scales, from the one that just reaches the largest weight to one that rounds it a fifth more coarsely (or, at
4 bits, clips it), the one with the least squared error wins and is fitted to its codes by least squares, scale =
sum(u w code) / sum(u code code). On normally distributed weights in groups of 32 that takes 24% off the squared error of 8 bits
with the largest weight at 127, 20% at 6 bits, 11% of that of GGUF's Q4_0 at 4. Offsets are searched alike: the range from
the smallest to the largest weight, somewhat narrowed, then the line that fits the rounded weights best. They cost every
product a second sum and as much room as the scales, so the fair comparison is with groups of half the size.

What fits best is too short: with the least squared error sum(w w') is sum(w' w'), less than sum(w w). That error has the
same sign in all rows and adds up where others cancel, so at last each row's scales are multiplied by sum(w w) / sum(w w'), 1.003
at 4 bits.

The error may be weighted by the `importance` of each column: the mean square of the input that it multiplies. Where that
is not known, an error at 4 bits without offsets counts u = |w| + mean |w| of its group: what is large is multiplied with
what is large more often than not.

In memory, and on disk where it is not laid out for the kernels (`layout.py`):

    codes     (rows, columns)      int8; at 4 bits (rows, columns / 2) uint8, column 2i in the low half, 2i+1 in the high;
                                   at 6 bits (rows, columns * 12 / 16) uint8: of each 16 columns 8 bytes with their lower
                                   four bits in that same way, then 4, the k-th with the upper two of k, k+4, k+8, k+12
    scales    (rows, groups)       float16
    offsets   (rows, groups)       float16, if there are any

where the last group may be shorter than the others. That is 8.5, 6.5 and 4.5 bits per weight in groups of 32.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.errors import DataError

# The codes that a group's largest weight is tried at, by bits: past the end of the range it is clipped, and whole ones it
# meets exactly.
_REACHES = {
    8: [128.0 - i for i in range(20)],
    6: [32.5 - i / 2 for i in range(16)],
    4: [6.8 + i / 5 for i in range(16)],
}
_REFITS = 2  # times that the best scale so far is fitted to its codes
_SHARES = (1.0, 0.94, 0.88, 0.82)  # of a group's range that the codes cover, with offsets
_WEIGHTS_AT_ONCE = 1 << 17  # what a search reads again and again stays in the processor's cache
_LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Packed:
    """A quantised matrix of `columns` columns."""

    codes: Tensor
    scales: Tensor
    columns: int
    bits: int
    group_size: int
    offsets: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and, if there are any, offsets."""
        return (self.codes, self.scales) if self.offsets is None else (self.codes, self.scales, self.offsets)

    def with_rows(self, order: Callable[[Tensor], Tensor]) -> "Packed":
        """The same rows in another order."""
        codes, scales, *offsets = map(order, self.tensors)
        return Packed(codes, scales, self.columns, self.bits, self.group_size, offsets[0] if offsets else None)

    def widened(self) -> "Packed":
        """The same numbers with codes of 8 bits in place of 6, for those who only know 4 and 8."""
        if self.bits != 6:
            return self
        return Packed(unpack(self).contiguous(), self.scales, self.columns, 8, self.group_size, self.offsets)

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors)


def code_dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits == 8 else torch.uint8


def quantise_matrix(
    weight: Tensor, bits: int, group_size: int, *, offset: bool = False, importance: Tensor | None = None
) -> Packed:
    """Quantise `weight` (rows, columns), each weight to the nearest code.

    `importance` (columns,) weighs the columns' errors. Raises `DataError` if a weight is not finite or too large for a
    float16 scale.
    """
    check_finite(weight)
    columns = weight.shape[1]
    found = [
        _quantise_rows(part.float(), bits, group_size, offset, importance)
        for part in weight.split(max(1, _WEIGHTS_AT_ONCE // columns))
    ]
    codes, scales, offsets = (None if parts[0] is None else torch.cat(parts) for parts in zip(*found))
    return pack(codes, scales, offsets, bits, group_size)


def pack(codes: Tensor, scales: Tensor, offsets: Tensor | None, bits: int, group_size: int) -> Packed:
    """Integers (rows, columns) int8 with their scales as a `Packed`."""
    packed = pack4(codes) if bits == 4 else pack6(codes) if bits == 6 else codes
    return Packed(packed, scales, codes.shape[1], bits, group_size, offsets)


def unpack(packed: Packed) -> Tensor:
    """The integers (rows, columns) int8."""
    codes = unpack4(packed.codes) if packed.bits == 4 else unpack6(packed.codes) if packed.bits == 6 else packed.codes
    return codes[:, : packed.columns]


def dequantise_matrix(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix (rows, columns) that the integers stand for."""
    codes = unpack(packed)
    if packed.columns % packed.group_size:

        def spread(values: Tensor) -> Tensor:
            return values.repeat_interleave(packed.group_size, 1)[:, : packed.columns].to(dtype)

        made = codes.to(dtype) * spread(packed.scales)
        return made if packed.offsets is None else made.add_(spread(packed.offsets))
    groups = codes.unflatten(1, (-1, packed.group_size))
    made = groups.to(dtype) * packed.scales[..., None].to(dtype)
    return (made if packed.offsets is None else made.add_(packed.offsets[..., None].to(dtype))).flatten(1)


def check_finite(weight: Tensor) -> None:
    """Raises `DataError` unless every weight is a number."""
    if not bool(weight.isfinite().all()):
        raise DataError("a weight is NaN or infinite", hint="the training run diverged: take an earlier checkpoint")


def _quantise_rows(
    weight: Tensor, bits: int, group_size: int, offset: bool, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    padding = (0, -weight.shape[1] % group_size)
    groups = torch.nn.functional.pad(weight, padding).unflatten(1, (-1, group_size))  # (rows, groups, size)
    inside = None
    if importance is not None or (offset and padding[1]):
        inside = torch.ones(weight.shape[1]) if importance is None else importance.float()
        inside = torch.nn.functional.pad(inside, padding).unflatten(0, (-1, group_size))
    scale, shift = fit_groups(groups, bits, offset=offset, importance=inside)
    codes = encode(groups, scale, shift, bits)
    factor = _kept_length(groups, codes, scale, shift, inside)
    kept = [None if numbers is None else (numbers * factor)[..., 0].half() for numbers in (scale, shift)]
    return codes.flatten(1)[:, : weight.shape[1]], kept[0], kept[1]


def _kept_length(
    groups: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None, importance: Tensor | None
) -> Tensor:
    """What each row's scales are multiplied with, (rows, 1, 1), so that the row's projection on itself is what it was."""
    again = codes * scale if offset is None else codes * scale + offset
    weighted = groups if importance is None else groups * importance
    return length_factor(*((weighted * other).flatten(1).sum(1) for other in (groups, again)))[:, None, None]


def length_factor(wanted: Tensor, found: Tensor) -> Tensor:
    """wanted / found; 1 where they are far apart, which is no rounding's bias but a row that float16 hardly tells from 0."""
    factor = torch.where(found > 0, wanted / found, 1.0)
    return torch.where((factor > 0.9) & (factor < 1.1), factor, 1.0)


def encode(groups: Tensor, scale: Tensor, offset: Tensor | None, bits: int) -> Tensor:
    """The nearest codes of `groups`, int8; `scale` and `offset` broadcast against them."""
    half = 1 << (bits - 1)
    inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
    shifted = groups if offset is None else groups - offset
    return (shifted * inverse).round_().clamp_(-half, half - 1).to(torch.int8)


def fit_groups(
    groups: Tensor, bits: int, *, offset: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The best scales, and offsets if asked for, of `groups` (..., size), each (..., 1) float32 that float16 holds.

    `importance`, broadcast against the groups, weighs the squared errors. Raises `DataError` for weights too large.
    """
    largest = groups.abs().amax(-1, keepdim=True)
    if float(largest.max()) > ((1 << (bits - 1)) - 1) * _LARGEST_SCALE or (
        offset and float(largest.max()) > _LARGEST_SCALE
    ):
        raise DataError("a weight is too large for a float16 scale", hint="this model cannot be quantised as it is")
    if not offset:
        if importance is None and bits == 4:
            importance = groups.abs() + groups.abs().mean(-1, keepdim=True)
        return _searched(groups, bits, importance), None
    weigh = 1.0 if importance is None else importance
    best_error = (groups.square() * weigh).sum(-1, keepdim=True)
    best_scale, best_offset = torch.zeros_like(largest), torch.zeros_like(largest)
    for scale, shift in _ranges(groups, bits, weigh):
        again = (encode(groups, scale, shift, bits).float() * scale).add_(shift)
        error = (groups - again).square_().mul_(weigh).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_offset = torch.where(better, scale, best_scale), torch.where(better, shift, best_offset)
    return best_scale, best_offset


def _searched(groups: Tensor, bits: int, weigh: Tensor | None) -> Tensor:
    """The scale (..., 1) with the least squared error among those tried."""
    half = 1 << (bits - 1)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    largest = torch.where(high > -low, high, low)
    codes, wrong = torch.empty_like(groups), torch.empty_like(groups)
    scale, least = torch.zeros_like(largest), _products(groups if weigh is None else groups * weigh, groups)

    def rounded(trial: Tensor) -> None:
        torch.mul(groups, torch.where(trial == 0, 0.0, 1.0 / trial), out=wrong)
        torch.round(wrong, out=codes).clamp_(-half, half - 1)

    for reach in [*_REACHES[bits], *[None] * _REFITS]:
        if reach is None:
            rounded(scale)
            weighted = codes if weigh is None else codes * weigh
            square = _products(weighted, codes)
            trial = torch.where(square > 0, _products(weighted, groups) / square, 0.0)
        else:
            trial = largest / -reach  # of the two ends of the codes the longer one
        trial = trial.half().float()
        rounded(trial)
        wrong.sub_(codes)
        error = _products(wrong if weigh is None else wrong * weigh, wrong) * trial.square()
        better = (error < least) & (trial != 0)
        scale, least = torch.where(better, trial, scale), torch.where(better, error, least)
    return scale


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Sums of products along the groups, (..., 1)."""
    return torch.linalg.vecdot(a, b)[..., None]


def _ranges(groups: Tensor, bits: int, weigh: Tensor | float) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and offsets that spread the codes over each group's range or less, and the lines fitted afterwards."""
    half = 1 << (bits - 1)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    middle, width = (low + high) / 2, high - low
    for share in _SHARES if bits == 4 else _SHARES[:1]:
        scale = (share * width / (2 * half - 1)).half().float()
        shift = (middle + scale / 2).half().float()  # the codes' middle is -1/2
        yield scale, shift
        codes = encode(groups, scale, shift, bits).float()
        weights = torch.as_tensor(weigh).expand_as(groups)
        total = weights.sum(-1, keepdim=True).clamp_min(1e-30)
        code_mean = (codes * weights).sum(-1, keepdim=True) / total
        mean = (groups * weights).sum(-1, keepdim=True) / total
        spread = ((codes - code_mean).square() * weights).sum(-1, keepdim=True)
        slope = ((codes - code_mean) * (groups - mean) * weights).sum(-1, keepdim=True) / spread.clamp_min(1e-30)
        slope = torch.where(spread > 0, slope, scale).half().float()
        yield slope, (mean - slope * code_mean).half().float()


def pack4(codes: Tensor) -> Tensor:
    """Codes -8 ... 7 (rows, columns) int8, two to a byte: (rows, columns / 2) uint8; an odd last one gets a 0 beside it."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    low, high = (even & 15).view(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack4(packed: Tensor) -> Tensor:
    """The inverse of `pack4`, the 0 beside an odd last code included."""
    signed = packed.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=-1).flatten(1)


def pack6(codes: Tensor) -> Tensor:
    """Codes -32 ... 31 (rows, columns) int8, 16 in 12 bytes: (rows, columns * 12 / 16) uint8, filled up with codes of 0."""
    rows = len(codes)
    whole = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 16))
    lower = pack4(whole).view(rows, -1, 8)
    upper = (whole.view(torch.uint8) >> 4 & 3).view(rows, -1, 4, 4)  # (rows, 16 columns, step, byte of a step)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return torch.cat((lower, (upper << shifts).sum(-2, dtype=torch.uint8)), -1).view(rows, -1)


def unpack6(packed: Tensor) -> Tensor:
    """The inverse of `pack6`, what fills the last 16 included."""
    units = packed.view(len(packed), -1, 12)
    low, high = units[..., :8] & 15, units[..., :8] >> 4
    lower = torch.stack((low, high), -1).flatten(-2)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    upper = (units[..., None, 8:] >> shifts & 3).flatten(-2)
    return ((lower | upper << 4) << 2).view(torch.int8).flatten(1) >> 2  # the sixth bit is the sign
