"""Rounding that knows what the matrix is multiplied with: GPTQ (arXiv 2210.17323) in our groups.

To round each weight of W to the nearest code minimises |W - Q|. What matters is |(W - Q) x| over the inputs x that the
matrix really gets, which is, with H = mean of x x^T over a text sample,

    loss(Q) = sum over rows of (w - q) H (w - q)^T

Columns are rounded from left to right; after each, the columns that are still free take over what the error did to the
product, as far as inputs are correlated. With U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for column j

    e = (w_j - q_j) / U_jj        w_k -= e U_jk   for k > j

Of what a row puts out least squares make less than it was, as in `groups.py`: its scales are multiplied by w H w / w H q.
A group's scale is searched when its first column is reached, over the weights as they are then, errors weighted by the
diagonal of H. Rows do not see each other, so a large matrix is done a part at a time. H is damped by a hundredth of its
mean diagonal; an input that is always zero cannot matter, and its column is left to plain rounding.
"""

import torch
from torch import Tensor

from puna.errors import DataError
from puna.quant.forms import Form
from puna.quant.groups import (
    Packed,
    check_finite,
    dequantise_matrix,
    encode,
    fit_groups,
    length_factor,
    pack,
    quantise_matrix,
)

DAMPING = 0.01
_BLOCK = 128  # columns between two updates of everything to the right
_WEIGHTS_AT_ONCE = 1 << 24


def calibrated(weight: Tensor, form: Form, hessian: Tensor) -> tuple[Packed, str]:
    """`weight` (rows, columns) in `form` with the least loss under `hessian` (columns, columns), and how it was rounded.

    Three ways compete on the loss above: `nearest`, `weighted` (scales chosen with the diagonal of H), `gptq`.
    Raises `DataError` for weights or a Hessian that are not finite.
    """
    check_finite(weight)
    if not bool(hessian.isfinite().all()):
        raise DataError("the sample drives the model to numbers that are not finite", hint="is the checkpoint whole?")
    form_of = {"offset": form.offset}
    ways = {
        "nearest": quantise_matrix(weight, form.bits, form.group_size, **form_of),
        "weighted": quantise_matrix(weight, form.bits, form.group_size, importance=importance_of(hessian), **form_of),
        "gptq": gptq(weight, form, hessian),
    }
    losses = {way: output_error(weight, dequantise_matrix(packed), hessian) for way, packed in ways.items()}
    best = min(losses, key=losses.__getitem__)
    return ways[best], best


def importance_of(hessian: Tensor) -> Tensor:
    """The mean square of each input; one that the sample hardly drives still counts a little."""
    diagonal = hessian.diagonal()
    return diagonal.clamp_min(DAMPING * float(diagonal.mean()))


def output_error(weight: Tensor, again: Tensor, hessian: Tensor) -> float:
    """sum over rows of (w - q) H (w - q)^T: the mean squared error of the product, summed over its outputs."""
    total = 0.0
    for part, other in zip(*(m.split(max(1, _WEIGHTS_AT_ONCE // weight.shape[1])) for m in (weight, again))):
        wrong = part.float() - other
        total += float(((wrong @ hessian) * wrong).sum(dtype=torch.float64))
    return total


def gptq(weight: Tensor, form: Form, hessian: Tensor) -> Packed:
    """`weight` rounded with error feedback (see above)."""
    factor = _factor(hessian)
    rows = max(1, _WEIGHTS_AT_ONCE // weight.shape[1])
    found = [_rows(part.float(), form, factor, hessian) for part in weight.split(rows)]
    codes, scales, offsets = (None if parts[0] is None else torch.cat(parts) for parts in zip(*found))
    return pack(codes, scales, offsets, form.bits, form.group_size)


def _factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse, in float32."""
    damped = hessian.double()
    diagonal = damped.diagonal().clone()
    dead = diagonal <= 0
    step = DAMPING * float(diagonal[~dead].mean()) if bool((~dead).any()) else 1.0
    while True:
        matrix = damped + torch.diag(torch.where(dead, 1.0, torch.full_like(diagonal, step)))
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.float()
        step *= 10  # few tokens or very unequal inputs: only a larger damping makes the inverse stable


def _rows(original: Tensor, form: Form, factor: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and offsets of some rows."""
    columns, size = original.shape[1], form.group_size
    weight, importance = original.clone(), importance_of(hessian)
    codes, rounded = torch.empty(weight.shape, dtype=torch.int8), torch.empty_like(weight)
    scales, offsets = [], []
    block = max(1, _BLOCK // size) * size  # whole groups, which so have heard of every error before them
    for first in range(0, columns, block):
        last = min(first + block, columns)
        errors = torch.empty(len(weight), last - first)
        for j in range(first, last):
            if j % size == 0:
                group = slice(j, min(j + size, columns))
                scale, shift = fit_groups(weight[:, group], form.bits, offset=form.offset, importance=importance[group])
                scales.append(scale)
                offsets.append(shift)
            column = weight[:, j : j + 1]
            code = encode(column, scale, shift, form.bits)
            codes[:, j : j + 1] = code
            again = code * scale if shift is None else code * scale + shift
            rounded[:, j : j + 1] = again
            error = (column - again) / factor[j, j]
            errors[:, j - first : j - first + 1] = error
            weight[:, j:last] -= error * factor[j, j:last]
        weight[:, last:] -= errors @ factor[first:last, last:]
    products = original @ hessian
    kept = length_factor((products * original).sum(1), (products * rounded).sum(1))[:, None]
    stacked = None if offsets[0] is None else (torch.cat(offsets, 1) * kept).half()
    return codes, (torch.cat(scales, 1) * kept).half(), stacked
