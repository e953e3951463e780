"""x W^T for an ordinary matrix.

PyTorch's operator, but for one token on a GPU: there it is a walk over the weights, and a plain kernel comes closer to
the memory's speed than a general matrix product.
"""

import torch.nn.functional as F
from torch import Tensor

from puna.kernels.triton import Implementation, chosen


def linear(x: Tensor, weight: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """`x` (N, columns) times the transposed `weight` (rows, columns): (N, rows)."""
    if len(x) == 1 and weight.shape[1] % 128 == 0 and chosen(impl, x):
        from puna.kernels.triton.quant_linear import plain_linear

        return plain_linear(x, weight)
    return F.linear(x, weight)
