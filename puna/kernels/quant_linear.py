"""x W^T for a matrix of small integers with a scale, and maybe an offset, per group of a row.

    w  =  scale * code + offset
    codes      (rows, columns) int8, or (rows, columns / 2) uint8: column 2i in the low half of byte i, 2i + 1 in the high
    scales     (rows, groups) float16, and so the offsets; the last group may be shorter

The form is that of `puna/quant/groups.py`. On a GPU one token is read by a kernel that streams the integers once; up to
`FEW` tokens share a product per group on the tensor cores, whose sums are scaled (the integers are exact in the
activations' type); more are worth an ordinary matrix product after the weights were expanded.
"""

import torch
from torch import Tensor

from puna.kernels.triton import Implementation, chosen

FEW = 128  # tokens


def quant_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    offsets: Tensor | None,
    group: int,
    *,
    impl: Implementation = "auto",
) -> Tensor:
    """`x` (N, columns) times the transposed matrix: (N, rows) in the type of `x`; sums are float32."""
    if chosen(impl, x) and _even(x.shape[1], codes, group, impl):
        from puna.kernels.triton.quant_linear import quant_linear as fused

        return fused(x, codes, scales, offsets, group)
    return (x.float() @ expand(codes, scales, offsets, group, x.shape[1]).T).to(x.dtype)


def expand(codes: Tensor, scales: Tensor, offsets: Tensor | None, group: int, columns: int) -> Tensor:
    """The matrix (rows, columns) float32."""
    if codes.dtype == torch.uint8:
        signed = codes.view(torch.int8)
        codes = torch.stack(((signed << 4) >> 4, signed >> 4), -1).flatten(1)[:, :columns]

    def spread(values: Tensor) -> Tensor:
        return values.float().repeat_interleave(group, 1)[:, :columns]

    made = codes.float() * spread(scales)
    return made if offsets is None else made + spread(offsets)


def _even(columns: int, codes: Tensor, group: int, impl: Implementation) -> bool:
    """Whether the kernels take this shape; raises `ValueError` if they were asked for and don't."""
    fits = columns % group == 0 and group >= 32 and group & (group - 1) == 0
    if not fits and impl == "triton":
        raise ValueError(f"{columns} columns in groups of {group}: the kernels take whole groups of 32, 64, 128, ...")
    return fits
