"""x W^T for a matrix of 8-bit floating-point numbers (e4m3) with a scale per row.

    w  =  scale * code          the largest weight of a row gets the largest code, 448

Few tokens are limited by how fast the weights are read: the kernels of `quant_linear` expand them on the way, and the
activations stay what they are. Many tokens are limited by arithmetic: they become 8-bit numbers too, with a scale per
token, and the GPU's own 8-bit product does the rest (`torch._scaled_mm`, from compute capability 8.9 on).
"""

import torch
from torch import Tensor

from puna.kernels.triton import Implementation, chosen

CODES = torch.float8_e4m3fn
FEW = 64  # tokens
_LARGEST = torch.finfo(CODES).max


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) e4m3 and scales (rows, 1) float32 of `x` (rows, columns)."""
    scales = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-12) / _LARGEST
    return (x.float() / scales).to(CODES), scales


def fp8_linear(x: Tensor, codes: Tensor, scales: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """`x` (N, columns) times the transposed matrix: (N, rows) in the type of `x`."""
    if not chosen(impl, x):
        return (x.float() @ (codes.float() * scales).T).to(x.dtype)
    if len(x) <= FEW:
        from puna.kernels.triton.quant_linear import scaled_linear

        return scaled_linear(x, codes, scales)
    mine, mine_scales = quantise_rows(x)
    return torch._scaled_mm(mine, codes.T, scale_a=mine_scales, scale_b=scales.T, out_dtype=x.dtype)
