"""RMSNorm, with the addition that comes before it in a transformer.

    total = x + residual                     the residual stream (without a residual: x)
    normed = total / rms(total) * weight     what the next matrix reads

Fused, the stream is read and written once where PyTorch's operators read it three times.
"""

import torch.nn.functional as F
from torch import Tensor

from puna.kernels.triton import Implementation, chosen


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, *, impl: Implementation = "auto"
) -> tuple[Tensor, Tensor]:
    """(normed, total) of `x` and `residual` (N, D), in their type; `weight` is (D,)."""
    if chosen(impl, x):
        from puna.kernels.triton.rms_norm import rms_norm as fused

        return fused(x, weight, eps, residual)
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight.to(x.dtype), eps), total
