"""A quantised matrix on disk as the C++ kernels read it, so that loading is a mapping of the file and nothing is moved.

`kernels/native/matrix.h` describes the layout; here it is in PyTorch, made and taken apart, so that a folder can be
written where no kernels were built and read by everything else: the reference, the GPU, the exports. It is the same for
all instruction sets. In short, for codes u = code + 2^(bits-1) without sign:

    block     16 rows. Group by group, step by step: the four columns of a step of row 0, of row 1, … of row 15
    8 bits    a step is a line of 64 bytes
    4 bits    two steps to a line, the even one in the low halves of the bytes
    6 bits    four steps to three lines: the lower four bits in two, then the upper two bits, the first step's lowest
    split     8-bit codes of an output matrix: the upper halves of all blocks as 4 bits lie, then the lower ones
    scales    a line before each two groups: sixteen scales of the one, sixteen of the other. With offsets a line before
              each group: its scales, its offsets

The tensor has the name of the matrix with `laid` for `weight` and the shape (blocks of 16 rows, bytes of one), uint8. Rows
are in Meta's order and filled up to 64, columns to whole groups. A matrix that this would make notably larger, or whose
groups the kernels don't know, stays in codes and scales (`forms.part_names`).
"""

from typing import TYPE_CHECKING

from puna.quant.forms import UNQUANTISED, Form

if TYPE_CHECKING:
    from torch import Tensor

    from puna.quant.groups import Packed

LAYOUT = 1  # of the names below; kernels that have another lay the weights out anew (`native.layout`)
LANES, CHUNK, LINE = 16, 64, 64  # rows of a block, rows that come together, bytes
_GROUP_BYTES = {4: 8, 6: 12, 8: 16}  # of the codes of 16 rows, for each column
_MOST_FILLING = 0.01
_ROWS_AT_ONCE = 1 << 12


def laid_name(name: str) -> str:
    """The tensor that holds the matrix `name` laid out."""
    return name.removesuffix("weight") + "laid"


def laid_shape(shape: tuple[int, int], form: Form) -> tuple[int, int]:
    """(blocks, bytes) of a matrix in a quantised form with groups of a multiple of 16."""
    rows, columns = shape
    groups = -(-columns // form.group_size)
    lines = groups if form.offset else -(-groups // 2)
    return -(-rows // CHUNK) * CHUNK // LANES, lines * LINE + groups * _GROUP_BYTES[form.bits] * form.group_size


def can_be_laid(shape: tuple[int, ...], form: Form) -> bool:
    """Whether the kernels have the form of a tensor."""
    return len(shape) == 2 and form.bits != UNQUANTISED and form.group_size % LANES == 0


def is_laid(shape: tuple[int, ...], form: Form) -> bool:
    """Whether a matrix is written laid out: if the kernels have its form, and filling up takes next to nothing."""
    if not can_be_laid(shape, form):
        return False
    blocks, size = laid_shape(shape, form)
    return blocks * size <= (1 + _MOST_FILLING) * form.bytes(shape)


def stored_bytes(shape: tuple[int, ...], form: Form) -> int:
    """What a tensor takes in a quantised folder."""
    if not is_laid(shape, form):
        return form.bytes(shape)
    blocks, size = laid_shape(shape, form)
    return blocks * size


def is_split(name: str, form: Form, tied: bool) -> bool:
    """Whether the halves of the codes of the matrix that Meta calls `name` lie apart: 8 bits, and it makes logits."""
    return form.bits == 8 and not form.offset and name == ("tok_embeddings.weight" if tied else "output.weight")


def lay(packed: "Packed", *, split: bool = False) -> "Tensor":
    """The matrix laid out, uint8 (blocks, bytes)."""
    import torch

    form = Form(packed.bits, packed.group_size, packed.offsets is not None)
    rows = len(packed.codes)
    laid = torch.empty(laid_shape((rows, packed.columns), form), dtype=torch.uint8)
    upper, lower = _parts(laid, packed.columns, form, split)
    for first in range(0, len(laid) * LANES, _ROWS_AT_ONCE):
        here = slice(first // LANES, (first + _ROWS_AT_ONCE) // LANES)
        codes, scales = _filled(packed, slice(first, first + _ROWS_AT_ONCE), len(laid[here]) * LANES)
        steps = _steps(codes, form.group_size)
        if split:
            lower[here] = _lines(steps & 15, 4).flatten(1)
        upper[here] = _with_scales(_lines(steps >> 4, 4) if split else _lines(steps, form.bits), scales, form)
    return laid


def unlay(laid: "Tensor", shape: tuple[int, int], form: Form, *, split: bool = False) -> "Packed":
    """The inverse of `lay`, for a matrix of `shape`."""
    import torch

    from puna.quant.forms import packed_shapes
    from puna.quant.groups import Packed, code_dtype, pack

    rows, columns = shape
    coded, grouped = packed_shapes(rows, columns, form.bits, form.group_size)
    codes = torch.empty(coded, dtype=code_dtype(form.bits))
    numbers = [torch.empty(grouped, dtype=torch.float16) for _ in range(2 if form.offset else 1)]
    upper, lower = _parts(laid, columns, form, split)
    for first in range(0, rows, _ROWS_AT_ONCE):
        here = slice(first // LANES, (first + _ROWS_AT_ONCE) // LANES)
        lines, found = _without_scales(upper[here], grouped[1], form)
        steps = _unlined(lines, 4 if split else form.bits)
        if split:
            steps = steps << 4 | _unlined(lower[here].view(lines.shape), 4)
        part = slice(first, min(rows, first + _ROWS_AT_ONCE))
        taken = _unstepped(steps)[: part.stop - first, :columns].contiguous() ^ 1 << (form.bits - 1)
        signed = taken.view(torch.int8) if form.bits == 8 else _signed(taken, form.bits)
        codes[part] = pack(signed, found[0], None, form.bits, form.group_size).codes
        for whole, some in zip(numbers, found):
            whole[part] = some[: part.stop - first]
    return Packed(codes, numbers[0], columns, form.bits, form.group_size, numbers[1] if form.offset else None)


def _parts(laid: "Tensor", columns: int, form: Form, split: bool) -> "tuple[Tensor, Tensor | None]":
    """What has the scales, and the lower halves of a split matrix: each (blocks, bytes)."""
    if not split:
        return laid, None
    blocks, size = laid.shape
    below = -(-columns // form.group_size) * form.group_size * _GROUP_BYTES[4]
    flat = laid.view(-1)
    return flat[: blocks * (size - below)].view(blocks, -1), flat[blocks * (size - below) :].view(blocks, -1)


def _filled(packed: "Packed", part: slice, rows: int) -> "tuple[Tensor, list[Tensor]]":
    """`part` of the codes without sign, uint8, filled up to `rows` rows and whole groups; scales (and offsets) likewise."""
    import torch
    from torch.nn.functional import pad

    from puna.quant.groups import Packed, unpack

    numbers = [n[part] for n in packed.tensors[1:]]
    codes = unpack(Packed(packed.codes[part], numbers[0], packed.columns, packed.bits, packed.group_size))
    below = (0, 0, 0, rows - len(codes))
    codes = pad(codes, (0, -packed.columns % packed.group_size, *below[2:]))
    half = 1 << (packed.bits - 1)
    return (codes.view(torch.uint8) + half) & (2 * half - 1), [pad(n, below) for n in numbers]


def _signed(codes: "Tensor", bits: int) -> "Tensor":
    """Numbers of `bits` bits, the uppermost their sign, as int8."""
    import torch

    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)


def _steps(codes: "Tensor", group: int) -> "Tensor":
    """(rows, columns) uint8 as (blocks, groups, steps, bytes of a line): a block's rows beside each other."""
    import torch

    fours = codes.contiguous().view(torch.int32).view(len(codes) // LANES, LANES, -1, group // 4)
    return fours.permute(0, 2, 3, 1).contiguous().view(torch.uint8)


def _unstepped(steps: "Tensor") -> "Tensor":
    """The inverse of `_steps`."""
    import torch

    fours = steps.contiguous().view(torch.int32).permute(0, 3, 1, 2).contiguous()
    return fours.view(len(steps) * LANES, -1).view(torch.uint8)


def _lines(steps: "Tensor", bits: int) -> "Tensor":
    """Steps as lines of `bits` bits a code: (blocks, groups, bytes)."""
    import torch

    if bits == 8:
        return steps.flatten(2)
    low, high = (steps & 15).unflatten(2, (-1, 2)).unbind(3)
    halves = low | high << 4  # (blocks, groups, lines, 64)
    if bits == 4:
        return halves.flatten(2)
    fours = (steps >> 4).unflatten(2, (-1, 4))
    twos = fours[..., 0, :] | fours[..., 1, :] << 2 | fours[..., 2, :] << 4 | fours[..., 3, :] << 6
    return torch.cat((halves.unflatten(2, (-1, 2)), twos[..., None, :]), 3).flatten(2)


def _unlined(lines: "Tensor", bits: int) -> "Tensor":
    """The inverse of `_lines`."""
    import torch

    lines = lines.unflatten(2, (-1, LINE))
    if bits == 8:
        return lines
    if bits == 4:
        return torch.stack((lines & 15, lines >> 4), 3).flatten(2, 3)
    unit = lines.unflatten(2, (-1, 3))
    lower = _unlined(unit[..., :2, :].flatten(2), 4).unflatten(2, (-1, 4))
    upper = torch.stack([unit[..., 2, :] >> shift & 3 for shift in (0, 2, 4, 6)], 3)
    return (lower | upper << 4).flatten(2, 3)


def _with_scales(lines: "Tensor", numbers: "list[Tensor]", form: Form) -> "Tensor":
    """Codes' lines (blocks, groups, bytes) with those of the scales before them: (blocks, bytes)."""
    import torch
    from torch.nn.functional import pad

    blocks, groups, size = lines.shape
    beside = [n.contiguous().view(blocks, LANES, groups).transpose(1, 2) for n in numbers]  # (blocks, groups, 16)
    if form.offset:
        heads = torch.cat(beside, 2).view(torch.uint8)
        return torch.cat((heads, lines), 2).flatten(1)
    odd = groups % 2
    heads = pad(beside[0], (0, 0, 0, odd)).contiguous().view(torch.uint8).view(blocks, -1, LINE)
    pairs = pad(lines, (0, 0, 0, odd)).view(blocks, -1, 2 * size)
    return torch.cat((heads, pairs), 2).flatten(1)[:, : (groups + odd) // 2 * LINE + groups * size]


def _without_scales(blocks: "Tensor", groups: int, form: Form) -> "tuple[Tensor, list[Tensor]]":
    """The inverse of `_with_scales`: lines, and numbers each (rows, groups)."""
    import torch
    from torch.nn.functional import pad

    count, odd = len(blocks), 0 if form.offset else groups % 2
    units = (groups + odd) // (1 if form.offset else 2)
    size = (blocks.shape[1] - units * LINE) // groups
    whole = pad(blocks, (0, odd * size)).view(count, units, -1)
    heads = whole[..., :LINE].contiguous().view(torch.float16).view(count, units, 2, LANES)
    lines = whole[..., LINE:].reshape(count, -1, size)[:, :groups]
    if form.offset:
        return lines, [heads[:, :, i].transpose(1, 2).reshape(-1, groups) for i in range(2)]
    return lines, [heads.flatten(1, 2)[:, :groups].transpose(1, 2).reshape(-1, groups)]
