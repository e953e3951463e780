"""Rotary positions for new queries and keys, and the keys' and values' way into the cache.

    qkv       (N, (H + 2 K) E)          what one matrix product made of N new tokens
    cos, sin  (N, E / 2) float32        the turn of each pair (2i, 2i + 1) of a head, as in Meta's weights
    slots     (N,) int32                where in the cache: block * block_tokens + position within the block
    keys, values   (blocks, block_tokens, K, E)

The pairs turn: (a, b) becomes (a cos - b sin, a sin + b cos).
"""

import torch
from torch import Tensor

from puna.kernels.triton import Implementation, chosen


def rotary_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    impl: Implementation = "auto",
) -> Tensor:
    """The turned queries (N, H, E); the turned keys and the values are written to `slots` of `keys` and `values`."""
    if chosen(impl, qkv):
        from puna.kernels.triton.rotary_cache import rotary_cache as fused

        return fused(qkv, cos, sin, slots, keys, values)
    K, E = keys.shape[2:]
    heads = qkv.view(len(qkv), -1, E)
    H = heads.shape[1] - 2 * K
    turned, new_values = _turn(heads[:, : H + K], cos[:, None], sin[:, None]), heads[:, H + K :]
    at = slots.long()
    keys.view(-1, K, E).index_copy_(0, at, turned[:, H:].to(keys.dtype))
    values.view(-1, K, E).index_copy_(0, at, new_values.to(values.dtype))
    return turned[:, :H].contiguous()


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)
