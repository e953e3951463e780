"""Rotary positions and the cache's writes: one program per token and head."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    qkv, cos, sin, slots, q, keys, values,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, PAIRS)
    inside = i < E // 2
    source = qkv + (token * (H + 2 * K) + head) * E + 2 * i
    a = tl.load(source, mask=inside, other=0.0)
    b = tl.load(source + 1, mask=inside, other=0.0)
    slot = tl.load(slots + token).to(tl.int64)
    if head < H + K:
        c = tl.load(cos + token * (E // 2) + i, mask=inside, other=0.0)
        s = tl.load(sin + token * (E // 2) + i, mask=inside, other=0.0)
        x, y = a.to(tl.float32), b.to(tl.float32)
        a, b = (x * c - y * s).to(q.dtype.element_ty), (x * s + y * c).to(q.dtype.element_ty)
        if head < H:
            target = q + (token * H + head) * E + 2 * i
            tl.store(target, a, mask=inside)
            tl.store(target + 1, b, mask=inside)
        else:
            target = keys + (slot * K + head - H) * E + 2 * i
            tl.store(target, a, mask=inside)
            tl.store(target + 1, b, mask=inside)
    else:
        target = values + (slot * K + head - H - K) * E + 2 * i
        tl.store(target, a, mask=inside)
        tl.store(target + 1, b, mask=inside)


def rotary_cache(qkv: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The turned queries (N, H, E); `keys` and `values` are written in place."""
    K, E = keys.shape[2:]
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    tokens, H = len(qkv), qkv.shape[1] // E - 2 * K
    q = qkv.new_empty(tokens, H, E)
    if tokens:
        pairs = triton.next_power_of_2(E // 2)
        _kernel[(tokens, H + 2 * K)](qkv, cos, sin, slots, q, keys, values, H=H, K=K, E=E, PAIRS=pairs, num_warps=1)
    return q
