"""SwiGLU in one pass; the product is rounded once."""

import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 1024  # columns of a program


@triton.jit
def _kernel(gate_up, out, F, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = i < F
    gate = tl.load(gate_up + row * 2 * F + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + i, mask=inside, other=0.0).to(tl.float32)
    made = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * F + i, made.to(out.dtype.element_ty), mask=inside)


def swiglu(gate_up: Tensor) -> Tensor:
    """(N, F) from `gate_up` (N, 2 F)."""
    gate_up = gate_up.contiguous()
    rows, columns = gate_up.shape
    out = gate_up.new_empty(rows, columns // 2)
    if rows:
        _kernel[(rows, triton.cdiv(columns // 2, _WIDTH))](gate_up, out, columns // 2, WIDTH=_WIDTH)
    return out
