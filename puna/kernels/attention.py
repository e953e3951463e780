"""Masked attention of grouped heads, within one set of tokens (training, scoring).

    softmax(q k^T / sqrt(E) where the mask allows) v

`reference` writes the formula out: it holds all (H, T, S) scores at once, and shows the grouping: H/K query heads share
one key/value head, so their queries are stacked and meet it in one product. `sdpa` is PyTorch's fused operator, which
needs no (T, S) scores but must be given keys and values repeated for each query head.

On a CPU in bfloat16 the written-out form is twice as fast up to about a thousand tokens (the fused backward pass is
slow there); `auto` knows that. Timing: `benchmarks/training_kernels.py`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Implementation = Literal["auto", "reference", "sdpa"]
WRITTEN_OUT_UP_TO = 1024  # tokens


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, impl: Implementation = "auto") -> Tensor:
    """Attend from `q` (B, T, H, E) to `k`, `v` (B, S, K, E); the result is (B, T, H, E).

    `mask` (B or 1, 1, T, S) is true where a query may see a key; None means causal, with S = T. Every query must see
    some key.
    """
    if impl == "auto":
        short = q.shape[1] <= WRITTEN_OUT_UP_TO and q.dtype == torch.bfloat16 and not q.is_cuda
        impl = "reference" if short else "sdpa"
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, E)
    out = _reference(q, k, v, mask) if impl == "reference" else _sdpa(q, k, v, mask)
    return out.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    B, H, T, E = q.shape
    K, S = k.shape[1], k.shape[2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    hidden = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, float("-inf"))
    stacked = (q * E**-0.5).reshape(B, K, H // K * T, E)
    scores = (stacked @ k.transpose(-1, -2)).view(B, H, T, S) + hidden
    return (scores.softmax(-1).view(B, K, H // K * T, S) @ v).view(B, H, T, E)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Key/value heads (B, K, S, E) repeated so that each of `heads` query heads has its own: (B, heads, S, E)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)
