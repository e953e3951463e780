"""Matrix products that read narrow weights and expand them in registers.

One token (`_one`): a program owns a few rows. It walks along them, GROUPS groups at a time, multiplies and adds each
weight on its own, and sums at the end. Few tokens (`_few`): a program owns a tile of the result and meets one group at
a time on the tensor cores; the group's scale is applied to the small product, not to the weights. `_expanded` writes
the weights out, for products large enough to be worth it.

Weights of 4 bits lie two to a byte, neighbours in the row: the low halves meet the even columns of x, the high halves
the odd ones. A code c becomes a number without a conversion, which GPUs do slowly: the bits of c + 8 under the exponent
of 2^23 are the number 2^23 + 8 + c.

FORM is "4" or "8" for integers with a scale per group, "e4m3" for 8-bit floating-point numbers with a scale per row (one
byte each, read as int8 too), "plain" for weights as they are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from puna.kernels.quant_linear import FEW

_PLAIN_GROUP = 128  # columns taken at a time where there are no groups

# What a program of `_one` takes: rows, bytes of a row at a time, warps. `benchmarks/gpu_inference.py` times others.
ONE_TILES: dict[str, tuple[int, int, int]] = {
    "4": (8, 512, 4),
    "8": (8, 512, 4),
    "e4m3": (8, 512, 4),
    "plain": (4, 1024, 4),
}
FEW_TILE = (64, 0, 4)  # of `_few`: rows; a group at a time; warps


@triton.jit
def _low_high(byte):
    """The numbers in the two halves of each byte (int8)."""
    word = byte.to(tl.int32)
    low = ((word & 15) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    high = (((word >> 4) & 15) ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0
    return low, high


@triton.jit
def _number(code, FORM: tl.constexpr):
    """A code that is a whole byte, or a weight, as a number."""
    return code.to(tl.float8e4nv, bitcast=True) if FORM == "e4m3" else code


@triton.jit
def _one(
    x, codes, scales, offsets, out, rows,
    COUNT: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, OFFSETS: tl.constexpr,
    ROWS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 2 if FORM == "4" else GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    acc = tl.zeros((ROWS, GROUPS, WIDTH), tl.float32)
    line = row.to(tl.int64)[:, None] * COUNT
    for first in range(0, COUNT, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (row < rows)[:, None] & (group < COUNT)[None, :]
        real = (group < COUNT)[None, :, None]
        at = (line + group[None, :])[:, :, None] * WIDTH + i[None, None, :]
        code = tl.load(codes + at, mask=inside[:, :, None], other=0)
        column = group[None, :, None] * GROUP
        if FORM == "4":
            low, high = _low_high(code)
            even = tl.load(x + column + 2 * i[None, None, :], mask=real, other=0.0).to(tl.float32)
            odd = tl.load(x + column + 2 * i[None, None, :] + 1, mask=real, other=0.0).to(tl.float32)
            product = low * even + high * odd
            met = even + odd
        else:
            met = tl.load(x + column + i[None, None, :], mask=real, other=0.0).to(tl.float32)
            product = _number(code, FORM).to(tl.float32) * met
        if FORM == "4" or FORM == "8":
            product *= tl.load(scales + line + group[None, :], mask=inside, other=0.0).to(tl.float32)[:, :, None]
        if OFFSETS:
            product += met * tl.load(offsets + line + group[None, :], mask=inside, other=0.0).to(tl.float32)[:, :, None]
        acc += product
    made = tl.sum(tl.sum(acc, 2), 1)
    if FORM == "e4m3":
        made *= tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(out + row, made.to(out.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=("tokens",))
def _few(
    x, codes, scales, offsets, out, tokens, rows,
    COUNT: tl.constexpr, GROUP: tl.constexpr, FORM: tl.constexpr, OFFSETS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 2 if FORM == "4" else GROUP
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    i = tl.arange(0, WIDTH)
    acc = tl.zeros((TOKENS, ROWS), tl.float32)
    line = row.to(tl.int64) * COUNT
    mine = x + token.to(tl.int64)[:, None] * (COUNT * GROUP)
    here, there = (token < tokens)[:, None], (row < rows)[None, :]
    for group in range(0, COUNT):
        code = tl.load(codes + ((line + group) * WIDTH)[None, :] + i[:, None], mask=there, other=0)  # (WIDTH, ROWS)
        if FORM == "4":
            low, high = _low_high(code)
            even = tl.load(mine + group * GROUP + 2 * i[None, :], mask=here, other=0.0)
            odd = tl.load(mine + group * GROUP + 2 * i[None, :] + 1, mask=here, other=0.0)
            product = tl.dot(even, low.to(even.dtype), input_precision="ieee")
            product += tl.dot(odd, high.to(odd.dtype), input_precision="ieee")
            met = tl.sum(even.to(tl.float32) + odd.to(tl.float32), 1)
        else:
            part = tl.load(mine + group * GROUP + i[None, :], mask=here, other=0.0)
            product = tl.dot(part, _number(code, FORM).to(part.dtype), input_precision="ieee")
            met = tl.sum(part.to(tl.float32), 1)
        if FORM == "4" or FORM == "8":
            product *= tl.load(scales + line + group, mask=row < rows, other=0.0).to(tl.float32)[None, :]
        if OFFSETS:
            offset = tl.load(offsets + line + group, mask=row < rows, other=0.0).to(tl.float32)
            product += met[:, None] * offset[None, :]
        acc += product
    if FORM == "e4m3":
        acc *= tl.load(scales + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    to = out + token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=here & there)


@triton.jit
def _expanded(
    codes, scales, offsets, out, groups,
    GROUP: tl.constexpr, FORM: tl.constexpr, OFFSETS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 2 if FORM == "4" else GROUP
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None]
    i = tl.arange(0, WIDTH)[None, :]
    scale = tl.load(scales + group, mask=group < groups, other=0.0).to(tl.float32)[:, None]
    code = tl.load(codes + group[:, None] * WIDTH + i, mask=inside, other=0)
    offset = scale * 0.0
    if OFFSETS:
        offset = tl.load(offsets + group, mask=group < groups, other=0.0).to(tl.float32)[:, None]
    to = out + group[:, None] * GROUP
    kind = out.dtype.element_ty
    if FORM == "4":
        low, high = _low_high(code)
        tl.store(to + 2 * i, (low * scale + offset).to(kind), mask=inside)
        tl.store(to + 2 * i + 1, (high * scale + offset).to(kind), mask=inside)
    else:
        tl.store(to + i, (code.to(tl.float32) * scale + offset).to(kind), mask=inside)


def quant_linear(x: Tensor, codes: Tensor, scales: Tensor, offsets: Tensor | None, group: int) -> Tensor:
    """`x` (N, columns) times the transposed matrix of integers."""
    if len(x) <= FEW:
        return product(x, codes, scales, offsets, group)
    return torch.nn.functional.linear(x, expand(codes, scales, offsets, group, x.dtype))


def scaled_linear(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """The same for 8-bit floating-point codes with one scale per row; few tokens."""
    return product(x, codes, scales, None, _PLAIN_GROUP)


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same for weights as they are, and one token."""
    return product(x, weight, None, None, _PLAIN_GROUP)


def expand(codes: Tensor, scales: Tensor, offsets: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, columns) in `dtype`."""
    rows, count = scales.shape
    out = torch.empty(rows, count * group, dtype=dtype, device=codes.device)
    at_once = max(1, 4096 // group)
    _expanded[(triton.cdiv(rows * count, at_once),)](
        codes.view(torch.int8), scales, scales if offsets is None else offsets, out, rows * count,
        GROUP=group, FORM=_form(codes), OFFSETS=offsets is not None, GROUPS=at_once,
    )  # fmt: skip
    return out


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    offsets: Tensor | None,
    group: int,
    *,
    tile: tuple[int, int, int] | None = None,
    tensor_cores: bool | None = None,
) -> Tensor:
    """Any of these, for few tokens; `tile` and `tensor_cores` overrule what a program takes and which kernel it is."""
    x, form = x.contiguous(), _form(codes)
    (tokens, columns), rows = x.shape, len(codes)
    out = x.new_empty(tokens, rows)
    if not tokens:
        return out
    raw = codes if form == "plain" else codes.view(torch.int8)
    beside = (raw if scales is None else scales, raw if offsets is None else offsets)
    shape = {"COUNT": columns // group, "GROUP": group, "FORM": form, "OFFSETS": offsets is not None}
    if tokens > 1 or tensor_cores:
        many = min(64, max(16, triton.next_power_of_2(tokens)))
        tall, _, warps = tile or FEW_TILE
        grid = (triton.cdiv(rows, tall), triton.cdiv(tokens, many))
        _few[grid](
            x, raw, *beside, out, tokens, rows, TOKENS=many, ROWS=tall, num_warps=warps, num_stages=4, **shape
        )  # fmt: skip
        return out
    tall, wide, warps = tile or ONE_TILES[form]
    bytes_per_group = group // 2 if form == "4" else group * codes.element_size()
    groups = max(1, wide // bytes_per_group)
    _one[(triton.cdiv(rows, tall),)](x, raw, *beside, out, rows, ROWS=tall, GROUPS=groups, num_warps=warps, **shape)
    return out


def _form(codes: Tensor) -> str:
    return {torch.uint8: "4", torch.int8: "8", torch.float8_e4m3fn: "e4m3"}.get(codes.dtype, "plain")
