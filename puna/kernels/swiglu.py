"""SwiGLU: silu(gate) * up, where one matrix product made both.

gate_up    (N, 2 F)    the gate's F columns, then the other F
"""

import torch.nn.functional as F
from torch import Tensor

from puna.kernels.triton import Implementation, chosen


def swiglu(gate_up: Tensor, *, impl: Implementation = "auto") -> Tensor:
    """(N, F) from `gate_up` (N, 2 F)."""
    if chosen(impl, gate_up):
        from puna.kernels.triton.swiglu import swiglu as fused

        return fused(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up
