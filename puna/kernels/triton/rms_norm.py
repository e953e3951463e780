"""RMSNorm with its addition: one program per row, which fits in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(x, residual, weight, normed, total, eps, D: tl.constexpr, WIDTH: tl.constexpr, ADDS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * D
    i = tl.arange(0, WIDTH)
    inside = i < D
    value = tl.load(x + row + i, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(residual + row + i, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + row + i, rounded, mask=inside)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / D + eps)
    value = value * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row + i, value.to(normed.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """(normed, total) for contiguous `x` and `residual` (N, D)."""
    x = x.contiguous()
    rows, D = x.shape
    normed = torch.empty_like(x)
    adds = residual is not None
    total = torch.empty_like(x) if adds else x
    if rows:
        width = triton.next_power_of_2(D)
        warps = min(max(width // 512, 1), 16)
        _kernel[(rows,)](
            x, residual if adds else x, weight, normed, total, eps, D=D, WIDTH=width, ADDS=adds, num_warps=warps
        )
    return normed, total
